"""Speculation changes nothing but the number of steps: tokens, log-probabilities and endings are those of plain
decoding, for every drafter, policy and company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tenon.engine.messages import Add, Embed
from tenon.engine.policies.forest import I32, Forest
from tenon.engine.policies.speculate import F64
from tenon.engine.policies.step_time import StepTimes
from tenon.engine.policies.table import SPECULATES
from tenon.engine.sequence import Seq
from tenon.engine.speculation.model import DraftModel
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.suffix import Suffix
from tests.engine.build import hash_engine, run, told

VOCAB = 12
"""Few tokens, so that guesses come true."""
DRAFTERS = ["ngram", "suffix", "draft", "suffix,ngram", "ngram,suffix,draft"]
LOOP = (3, 4, 5, 6, 7, 8) * 12
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9},
    "filtered": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "biased": {"temperature": 0.5, "logit_bias": ((3, 9.0), (4, 8.0), (5, 8.0)), "bad_words": ((6,), (3, 4))},
    "forked": {"temperature": 1.0, "n": 3},
    "stopped": {"temperature": 0.6, "stop_ids": (9, 10), "min_tokens": 4},
    "scored": {"temperature": 0.8, "n_logprobs": 3},
    "short": {"temperature": 0.8, "max_tokens": 2},
}


def requests(times: int = 1) -> list[Add]:
    """Each option with prompts that share their beginnings."""
    made = []
    for i in range(times):
        for k, (name, options) in enumerate(OPTIONS.items()):
            rest = {"max_tokens": 30, "seed": 7 * i + k} | options
            made.append(Add(f"{name}-{i}", LOOP[: 20 + 9 * i + 3 * k], **rest))
    return made


PLAIN = told(hash_engine(200, VOCAB), requests(2))


def share(drafters: str, policy: str) -> object:
    """Of all combinations those with all drafters or the policy that takes most are in the quick run."""
    quick = drafters == DRAFTERS[-1] or policy == "fixed-tree"
    return pytest.param(drafters, policy, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("drafters", "policy"), [share(d, p) for d in DRAFTERS for p in SPECULATES])
def test_what_is_told_is_the_same(drafters: str, policy: str) -> None:
    made = hash_engine(200, VOCAB, speculative=drafters, speculative_policy=policy, draft_blocks=100)
    assert told(made, requests(2)) == PLAIN
    counts = made.scheduler.speculation.counts  # type: ignore[union-attr]
    assert counts.accepted > (50 if "draft" in drafters else 0)


WAYS: list[dict[str, Any]] = [
    {"n_blocks": 14},
    {"n_blocks": 14, "max_preemptions": 0},
    {"n_blocks": 16, "prefix_cache": False},
    {"n_blocks": 40, "max_step_tokens": 7},
    {"n_blocks": 40, "max_step_tokens": 1},
    {"n_blocks": 40, "max_sequences": 3},
    {"n_blocks": 40, "reuse": "prefix", "pending": "private"},
    {"n_blocks": 60, "block_tokens": 4, "evict": "tuned"},
    {"n_blocks": 90, "block_tokens": 2},
    {"n_blocks": 200, "block_tokens": 1, "speculative_nodes": 40, "speculative_depth": 20},
    {"n_blocks": 40, "draft_blocks": 5},
    {"n_blocks": 40, "draft_seed": 3},
]


PAIRS = [share(d, p) for d in ("suffix,ngram", "draft", DRAFTERS[-1]) for p in ("fixed-tree", "pays")]


@pytest.mark.parametrize(("drafters", "policy"), PAIRS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_in_tight_and_odd_places_too(way: dict[str, Any], drafters: str, policy: str) -> None:
    made = hash_engine(vocab_size=VOCAB, speculative=drafters, speculative_policy=policy, **way)
    assert told(made, requests(2)) == PLAIN
    assert made.stats(0.0).blocks_held == 0


def test_a_draft_model_that_knows_the_target_is_always_right() -> None:
    """At any temperature: it guesses with the noise that the target samples with."""
    adds = [Add(f"r{i}", LOOP[: 10 + i], 41, i, temperature=(0.0, 0.7, 1.5)[i % 3], n=1 + i % 2) for i in range(6)]
    made = hash_engine(200, 300, speculative="draft", speculative_policy="chain-4", draft_blocks=100)
    assert run(made, adds) == run(hash_engine(200, 300), adds)
    counts = made.scheduler.speculation.counts  # type: ignore[union-attr]
    assert counts.accepted == counts.nodes > 200
    assert made.stats(0.0).steps <= 12


class NowAndThen:
    """In three rounds of six nobody drafts."""

    n_rounds = 0

    def choose(self, warm: Sequence[int], n_decodes: int) -> tuple[int, int]:
        self.n_rounds += 1
        return (4, 1 + self.n_rounds // 6 % 2) if self.n_rounds // 3 % 2 else (0, 0)

    def goes_on(self, hopes_n: F64, counts_n: F64, n_nodes: int) -> bool:
        return True

    def told(self, rate: float) -> None:
        """Nothing depends on it."""

    def observe(self, warm: int, ranks: Sequence[int], right: int | None) -> None:
        """Nothing to learn."""


def test_a_draft_model_catches_up_after_rounds_without_it() -> None:
    adds = [Add(f"r{i}", LOOP[: 30 + i], 60, i, temperature=0.5) for i in range(3)]
    made = hash_engine(200, 300, speculative="draft", speculative_policy="fixed-tree", draft_blocks=100)
    speculation = made.scheduler.speculation
    assert speculation is not None
    model = speculation.drafters[0]
    assert isinstance(model, DraftModel)
    model.plan = NowAndThen()
    assert run(made, adds) == run(hash_engine(200, 300), adds)
    counts = speculation.counts
    assert counts.accepted == sum(counts.accepted_at) > 50
    assert counts.reached[:4] == counts.accepted_at[:4]  # what it says is right, whatever it has missed


def test_a_request_may_ask_for_no_guesses_or_few() -> None:
    adds = [Add(f"r{i}", LOOP[: 30 + i], 40, i, temperature=0.0, speculate=(0, 0, 1)[i]) for i in range(3)]
    made = hash_engine(200, VOCAB, speculative="suffix", speculative_policy="fixed-tree")
    assert run(made, adds) == run(hash_engine(200, VOCAB), adds)
    counts = made.scheduler.speculation.counts  # type: ignore[union-attr]
    assert counts.trees > 10
    assert not any(counts.reached[1:])


def test_prompts_are_scored_and_embedded_beside_trees() -> None:
    adds = [
        Add("loop", LOOP, 40, 0, temperature=0.0),
        Add("scored", LOOP[:33], 20, 1, temperature=0.4, prompt_logprobs=2, n_logprobs=1),
        Add("embedded", LOOP[:21], 0, 0, embed=Embed("mean")),
    ]
    found = []
    for config in ({}, {"speculative": "suffix", "speculative_policy": "fixed-tree"}):
        made = hash_engine(200, VOCAB, max_step_tokens=24, **config)
        answers, scores = told(made, adds), made.take_prompt_scores()  # in more pieces beside trees
        pieces = [tuple(x) for x in zip(*((each.logprobs, each.top, each.ranks) for each in scores), strict=True)]
        found.append((answers, [sum(piece, ()) for piece in pieces], made.take_embedded()))
    assert found[0] == found[1]


def test_requests_come_and_go_between_trees() -> None:
    """Aborts and newcomers while trees are on their way: whoever stays says what it would have said."""
    rng = np.random.default_rng(5)
    adds = requests(3)
    plain = told(hash_engine(300, VOCAB), adds)
    made = hash_engine(40, VOCAB, speculative="ngram,suffix,draft", speculative_policy="fixed-tree")
    left, dropped = list(adds), set()
    found: dict[tuple[str, int], list[int]] = {}
    while left or made.has_work:
        while left and rng.random() < 0.4:
            made.add(left.pop(0))
        if made.scheduler.requests and rng.random() < 0.05:
            dropped.add(name := str(rng.choice(sorted(made.scheduler.requests))))
            made.abort(name)
        for delta in made.tick(0.0):
            found.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
        made.check_integrity()
    assert len(dropped) > 3
    for key, one in plain.items():
        assert key[0] in dropped or found[key] == one.ids
    assert made.stats(0.0).blocks_held == 0


def test_weights_that_change_are_not_guessed_for_with_old_words() -> None:
    made = hash_engine(200, VOCAB, speculative="suffix", speculative_policy="fixed-tree")
    run(made, [Add("a", LOOP, 40, 0, temperature=0.0)])
    made.load_weights("", 1)
    speculation = made.scheduler.speculation
    assert speculation is not None
    assert speculation.drafters[0]._generations == {}  # type: ignore[attr-defined]
    run(made, [Add("b", LOOP, 40, 0, temperature=0.0)])


class Broken:
    """A drafter that fails after some rounds."""

    name, kinds, beliefs = "broken", ("broken",), (0.0,)
    n_rounds = 0

    def propose(self, seqs: Sequence[Seq], depth_n: I32, room: int) -> Forest | None:
        self.n_rounds += 1
        if self.n_rounds > 5:
            raise RuntimeError("out of guesses")
        forest = Forest.empty(len(seqs), room)
        forest.token[:, 0], forest.depth[:, 0], forest.q[:, 0] = 3, 1, 0.5
        return forest

    def forget(self, seq: Seq) -> None:
        """It remembers nobody."""

    reset = close = lambda self: None


def test_a_drafter_that_fails_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    made = hash_engine(200, VOCAB, speculative="suffix", speculative_policy="fixed-tree")
    broken = Broken()
    speculation = Speculation([Suffix(), broken], SPECULATES["fixed-tree"](), StepTimes({1: 1e-3}))
    made.scheduler.speculation = speculation
    assert told(made, requests(2)) == PLAIN
    assert speculation.lost == {"broken"}
    assert broken.n_rounds == 6
    assert "broken makes no more guesses" in caplog.text
    assert speculation.counts.accepted > 5
