"""``LLM`` on the embedded model: what a script sees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tenon import LLM, SamplingParams
from tenon.base.errors import ConfigError, ContextTooLong, RequestError
from tenon.models.hub import resolve

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("embedded", progress=False, max_sequences=8, max_model_len=512) as model:
        yield model


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["import os\n", "def f(x):\n", "class A:\n"]
    together = llm.generate(prompts, GREEDY)
    assert [answer.prompt_ids for answer in together] == [llm.tokenizer.encode(p, add_special=True) for p in prompts]
    assert all(len(answer.outputs[0].ids) == 24 for answer in together)


def test_one_prompt_as_text_or_ids(llm: LLM) -> None:
    text = llm.generate("import os\n", GREEDY)[0]
    ids = llm.generate(text.prompt_ids, GREEDY)[0]
    assert text.outputs[0].ids == ids.outputs[0].ids


def test_a_seed_repeats_itself_and_samples_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=16, seed=5, n=3, ignore_eos=True)
    first, again = llm.generate("def g():\n", params)[0], llm.generate("def g():\n", params)[0]
    assert [o.ids for o in first.outputs] == [o.ids for o in again.outputs]
    assert len({tuple(o.ids) for o in first.outputs}) == 3


def test_a_drawn_seed_is_told_and_repeats_the_run(llm: LLM) -> None:
    drawn = llm.generate("def g():\n", SamplingParams(max_tokens=12, ignore_eos=True))[0]
    again = llm.generate("def g():\n", SamplingParams(max_tokens=12, ignore_eos=True, seed=drawn.seed))[0]
    assert drawn.outputs[0].ids == again.outputs[0].ids


def test_a_stop_string_cuts_the_text_and_ends_the_request(llm: LLM) -> None:
    whole = llm.generate("import os\n", GREEDY)[0].outputs[0].text
    stop = whole[4:7]
    cut = llm.generate("import os\n", GREEDY.with_(stop=(stop,)))[0].outputs[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert llm.engine.stats(0).running == 0


def test_logprobs_hold_the_chosen_token(llm: LLM) -> None:
    output = llm.generate("import os\n", GREEDY.with_(logprobs=2))[0].outputs[0]
    assert len(output.logprobs) == len(output.top_logprobs) == 24
    for token, logprob, top in zip(output.ids, output.logprobs, output.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == pytest.approx(logprob)


def test_a_prompt_s_tokens_are_scored_as_if_they_had_been_generated(llm: LLM) -> None:
    answer = llm.generate("def f(x):\n", GREEDY.with_(logprobs=0))[0]
    whole = answer.prompt_ids + answer.outputs[0].ids
    scored = llm.generate(whole, GREEDY.with_(max_tokens=1, prompt_logprobs=1))[0]
    assert len(scored.prompt_logprobs) == len(whole) - 1 == len(scored.prompt_top_logprobs)
    generated = scored.prompt_logprobs[len(answer.prompt_ids) - 1 :]
    assert generated == pytest.approx(answer.outputs[0].logprobs, abs=0.1)  # bf16, in other company
    assert not llm.engine.take_prompt_scores()
    assert llm.generate("def f(x):\n", GREEDY)[0].prompt_logprobs == []


def test_chat_goes_through_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "Hello"}], GREEDY)
    assert "Hello" in llm.tokenizer.decode(answer.prompt_ids)
    assert answer.outputs[0].ids


def test_a_prompt_that_cannot_be_served_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ContextTooLong, match="maximum context length is 512"):
        llm.generate([[1] * 10, [1] * 600], GREEDY)
    with pytest.raises(RequestError, match="2 prompts need as many params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([[1], [10**6]], GREEDY)
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="numerics"):
        LLM("embedded", numerics="exact", progress=False)


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, "examples/generate.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "def add(a, b):" in done.stdout


def test_texts_are_embedded_in_their_order(llm: LLM) -> None:
    vectors = llm.embed(["import os\n", "def f(x):\n", "import os\n"])
    assert vectors.shape == (3, llm.spec.hidden_size)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert vectors[0] == pytest.approx(vectors[2], abs=0.02)  # bf16, in other company
    assert vectors[0] @ vectors[1] < 0.99
    assert llm.embed(llm.tokenizer.encode("def f(x):\n", add_special=True))[0] == pytest.approx(vectors[1], abs=0.02)
    assert llm.embed("import os\n", dimensions=8).shape == (1, 8)
    assert llm.embed([]).shape == (0, llm.spec.hidden_size)
    with pytest.raises(RequestError, match="dimensions must be from 1 to"):
        llm.embed("x", dimensions=10**6)
    with pytest.raises(ContextTooLong, match="maximum context length is 512"):
        llm.embed([[1] * 10, [1] * 600])
    assert llm.engine.stats(0).running == llm.engine.stats(0).waiting == 0


def test_guesses_change_no_answer(llm: LLM) -> None:
    """A stop string within a step's tokens included: what follows it in the same step is dropped."""
    prompt = "def f(a, b, c, d, e):\n    self.a = a\n    self.b = b\n    self.c = c\n"
    sampled = SamplingParams(temperature=0.8, max_tokens=60, seed=9, n=2, logprobs=1, ignore_eos=True)
    greedy = GREEDY.with_(max_tokens=80, logprobs=0)
    with LLM(
        "embedded", progress=False, max_model_len=512, numerics="invariant", speculative="suffix,embedded-draft",
        speculative_policy="fixed-tree",
    ) as guessing, LLM("embedded", progress=False, max_model_len=512, numerics="invariant") as plain:  # fmt: skip
        text = plain.generate(prompt, greedy)[0].outputs[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        for params in (greedy, sampled, greedy.with_(stop=(stop,)), greedy.with_(max_tokens=7)):
            assert guessing.generate(prompt, params)[0].outputs == plain.generate(prompt, params)[0].outputs
        counts = guessing.engine.scheduler.speculation.counts  # type: ignore[union-attr]
        assert counts.accepted > 40
        before = counts.trees
        guessing.generate(prompt, greedy.with_(speculative=False))
        assert counts.trees == before


def test_a_draft_model_of_another_tongue_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(resolve("embedded-draft"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[1000:1002]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="has another tokenizer: token 1000 is"):
        LLM("embedded", progress=False, speculative=str(folder))
