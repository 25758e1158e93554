"""Embeddings: the right hidden states, whatever chunks, caches, preemptions and company do to the sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from tenon.base.errors import ContextTooLong, RequestError
from tenon.engine.config import EngineConfig
from tenon.engine.embed import wanted
from tenon.engine.engine import Engine
from tenon.engine.executors.hash import HashExecutor
from tenon.engine.executors.isolated import Isolated
from tenon.engine.messages import Add, Embed
from tenon.models.embedding import EmbeddingSpec
from tenon.models.spec import KVGroup
from tests.engine.build import Lab, Labs, Outputs, engine, hash_engine, ids
from tests.models import zoo

VOCAB = 60
Vectors = dict[str, NDArray[np.float32]]


def serve(made: Engine, adds: list[Add]) -> tuple[Vectors, Outputs]:
    """Serve to the end. Each vector must come once, and nothing else of its request."""
    for add in adds:
        made.add(add)
    embeds = {add.request_id for add in adds if add.embed is not None}
    vectors: Vectors = {}
    outputs: Outputs = {}
    while made.has_work:
        for delta in made.tick(0.0):
            assert delta.request_id not in embeds
            outputs.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        for one in made.take_embedded():
            assert one.request_id not in vectors
            vectors[one.request_id] = np.frombuffer(one.vector, "<f4")
        made.check_integrity()
    assert set(vectors) == embeds
    return vectors, outputs


def unit(vector: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(vector / np.linalg.norm(vector))


def adds_of(n: int) -> list[Add]:
    """Prompts of many lengths with a beginning in common: embedded by the last token, by the mean, continued."""
    rng = np.random.default_rng(n)
    shared = tuple(rng.integers(0, VOCAB, 40).tolist())
    prompts = [shared[: rng.integers(1, 40)] + tuple(rng.integers(0, VOCAB, i % 9).tolist()) for i in range(n)]
    kinds = [Embed("last"), Embed("mean", normalize=False), None]
    return [
        Add(f"r{i}", p, 0 if kinds[i % 3] else 12, i, temperature=float(i % 2), embed=kinds[i % 3])
        for i, p in enumerate(prompts)
    ]


def right(add: Add) -> NDArray[Any]:
    oracle, tokens = HashExecutor(VOCAB), np.array(add.prompt, np.int32)
    assert add.embed is not None
    if add.embed.pooling == "last":
        return unit(oracle.hidden(tokens))
    return np.asarray(np.mean([oracle.hidden(tokens[: i + 1]).astype(np.float64) for i in range(len(tokens))], axis=0))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_step_tokens": 5},
        {"n_blocks": 9, "max_sequences": 6},
        {"n_blocks": 6, "max_step_tokens": 3},
        {"prefix_cache": False},
        {"reuse": "blocks", "pending": "share", "n_blocks": 12, "max_step_tokens": 7},
    ],
)
def test_vectors_are_right_and_nothing_else_changes(config: dict[str, Any]) -> None:
    adds = adds_of(15)
    made = hash_engine(vocab_size=VOCAB, **config)
    vectors, outputs = serve(made, adds)
    for add in adds:
        if add.embed is not None:
            assert vectors[add.request_id] == pytest.approx(right(add), abs=1e-6)
    plain = [add for add in adds if add.embed is None]
    assert outputs == serve(hash_engine(400, VOCAB), plain)[1]
    assert made.stats(0.0).blocks_held == 0
    assert made.stats(0.0).finished == {"stop": 10, "length": 5}
    if config.get("n_blocks") == 9:
        assert made.scheduler.counters.preemptions > 0


def test_a_mean_goes_on_after_its_sequence_was_preempted() -> None:
    """The first arrival grows until the second, half summed, has to give its blocks up."""
    made = hash_engine(n_blocks=8, vocab_size=VOCAB, max_step_tokens=2)
    prompt = tuple(i * 11 % VOCAB for i in range(60))
    adds = [Add("first", (1, 2, 3), 60, 0), Add("mean", prompt, 0, 0, embed=Embed("mean"))]
    vectors, _ = serve(made, adds)
    assert made.scheduler.counters.preemptions > 0
    assert vectors["mean"] == pytest.approx(unit(right(adds[1])), abs=1e-6)


def test_the_last_token_takes_what_is_in_the_cache_and_the_mean_does_not() -> None:
    made = hash_engine(vocab_size=VOCAB)
    prompt = tuple(i * 7 % VOCAB for i in range(64))
    means = [Add(name, prompt, 0, 0, embed=Embed("mean")) for name in "ab"]
    first = serve(made, means[:1])[0]["a"]
    assert np.array_equal(serve(made, means[1:])[0]["b"], first)
    assert made.scheduler.counters.cached_tokens == 0
    last = serve(made, [Add("c", prompt, 0, 0, embed=Embed("last"))])[0]["c"]
    assert made.scheduler.counters.cached_tokens == 48
    assert last == pytest.approx(right(Add("c", prompt, 0, 0, embed=Embed("last"))), abs=1e-6)


def test_dimensions_come_before_the_length() -> None:
    whole, cut, raw = (
        serve(hash_engine(vocab_size=VOCAB), [Add("a", (4, 5), 0, 0, embed=e)])[0]["a"]
        for e in (Embed("last"), Embed("last", True, 3), Embed("last", False, 3))
    )
    assert np.linalg.norm(whole) == pytest.approx(1) == np.linalg.norm(cut)
    assert cut == pytest.approx(unit(whole[:3]), abs=1e-6)
    assert cut == pytest.approx(unit(raw), abs=1e-6)
    assert np.linalg.norm(raw) != pytest.approx(1)


def test_a_prompt_may_fill_the_context_and_be_dropped_on_its_way() -> None:
    made = hash_engine(vocab_size=VOCAB, max_step_tokens=16)
    limit = made.identity.max_model_len
    assert serve(made, [Add("full", (1,) * limit, 0, 0, embed=Embed("mean"))])[0]
    with pytest.raises(ContextTooLong, match="maximum context length"):
        made.add(Add("more", (1,) * (limit + 1), 0, 0, embed=Embed("mean")))
    made.add(Add("dropped", (2,) * 100, 0, 0, embed=Embed("mean")))
    made.tick(0.0)
    assert made.abort("dropped")
    assert not made.has_work
    assert made.stats(0.0).blocks_held == 0
    made.check_integrity()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed": Embed("first")}, "last, mean"),
        ({"embed": Embed("last", True, -1)}, "at least 0 dimensions"),
        ({"max_tokens": 1}, "max_tokens 0"),
        ({"n": 2}, "n 1"),
        ({"prompt_logprobs": 0}, "no prompt_logprobs"),
        ({"outputs": (1,)}, "no outputs"),
    ],
)
def test_what_cannot_be_embedded_is_named(changes: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 0, "seed": 0, "embed": Embed("last")}
    with pytest.raises(RequestError, match=said) as caught:
        hash_engine(vocab_size=VOCAB).add(Add("a", (1, 2), **asked | changes))
    assert caught.value.param == "embed"


def test_the_wish_is_within_the_model_s_width() -> None:
    spec = EmbeddingSpec(8, "mean", normalize=False)
    assert wanted(spec, None) == Embed("mean", False, 0)
    assert wanted(spec, 8) == Embed("mean", False, 8)
    for dimensions in (0, 9):
        with pytest.raises(RequestError, match="from 1 to 8, the width of this model"):
            wanted(spec, dimensions)
    with pytest.raises(RequestError, match="not supported: so it is"):
        wanted(EmbeddingSpec(8, refusal="so it is"), None)


class Brittle(HashExecutor):
    """Raises whenever a row is of token 59."""

    def submit(self, step: Any) -> Any:
        if (step.tok == 59).any():
            raise RuntimeError("59")
        return super().submit(step)


def test_an_exception_costs_one_embedding() -> None:
    group = KVGroup("m", (0,), "full", None, 16, 1)
    made = engine(Isolated(Brittle(VOCAB)), (group,), 40, VOCAB, EngineConfig(executor="hash"))
    adds = [Add("a", (1, 2, 3), 0, 0, embed=Embed("mean")), Add("bad", (4, 59), 0, 0, embed=Embed("last"))]
    adds += [Add("b", (7,), 0, 0, embed=Embed("last"))]
    for add in adds:
        made.add(add)
    deltas = made.tick(0.0)
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [("bad", "error")]
    found = {one.request_id: np.frombuffer(one.vector, "<f4") for one in made.take_embedded()}
    assert found["a"] == pytest.approx(unit(right(adds[0])), abs=1e-6)
    assert found["b"] == pytest.approx(right(adds[2]), abs=1e-6)
    assert set(found) == {"a", "b"}


def hidden_of(folder: Path, prompt: tuple[int, ...]) -> NDArray[np.float32]:
    """(T, M) last hidden states of transformers' model without its output layer, in fp32."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        states: NDArray[np.float32] = model(torch.tensor([prompt])).last_hidden_state[0].numpy()
    return states


@pytest.mark.torch
@pytest.mark.parametrize(("name", "head_dim"), [("llama", 32), ("qwen3_moe", 32), ("mistral-window", None)])
def test_vectors_are_transformers_last_hidden_states(name: str, head_dim: int | None, lab: Labs) -> None:
    it = lab(name, "fp32", head_dim)
    rng = np.random.default_rng(4)
    prompts = [ids(rng, n) for n in (1, 17, 70)]
    states = [hidden_of(it.folder, prompt) for prompt in prompts]
    made = it.engine(n_blocks=9, max_step_tokens=3)
    adds = [Add("generated", ids(rng, 3), 100, 0, temperature=0.0)]
    for i, prompt in enumerate(prompts):
        adds.append(Add(f"last{i}", prompt, 0, 0, embed=Embed("last")))
        adds.append(Add(f"mean{i}", prompt, 0, 0, embed=Embed("mean")))
        adds.append(Add(f"again{i}", prompt, 0, 0, embed=Embed("last", normalize=False)))
    vectors, _ = serve(made, adds)
    assert made.scheduler.counters.preemptions > 0
    assert made.scheduler.counters.cached_tokens > 0
    for i, rows in enumerate(states):
        assert vectors[f"last{i}"] == pytest.approx(unit(rows[-1]), abs=1e-5)
        assert vectors[f"mean{i}"] == pytest.approx(unit(rows.mean(0)), abs=1e-5)
        assert vectors[f"again{i}"] == pytest.approx(rows[-1], abs=1e-5 * float(np.abs(rows[-1]).max()))


@pytest.mark.torch
def test_a_checkpoint_without_an_output_layer_embeds_and_generates_nothing(tmp_path: Path) -> None:
    settings = zoo.config("qwen3")
    model = transformers.AutoModel.from_config(settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    it = Lab("qwen3", "fp32", tmp_path, None)
    assert not it.executor.has_head
    prompt = ids(np.random.default_rng(1), 30)
    vector = serve(it.engine(), [Add("a", prompt, 0, 0, embed=Embed("last"))])[0]["a"]
    assert vector == pytest.approx(unit(hidden_of(tmp_path, prompt)[-1]), abs=1e-5)


def test_without_an_output_layer_only_embeddings_are_taken() -> None:
    made = hash_engine(vocab_size=VOCAB)
    made.identity = replace(made.identity, generates=False)
    with pytest.raises(RequestError, match="no output layer"):
        made.add(Add("a", (1,), 1, 0))
    assert serve(made, [Add("b", (1,), 0, 0, embed=Embed("last"))])[0]
