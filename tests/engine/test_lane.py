"""A lane gives the steps that the scheduler's walk gives, whatever comes, goes or is aborted in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.engine import Engine
from tenon.engine.messages import Add, Delta
from tests.engine.build import hash_engine

ADDS = st.lists(
    st.fixed_dictionaries(
        {
            "tick": st.integers(0, 30),
            "n_prompt": st.integers(1, 40),
            "max_tokens": st.integers(1, 50),
            "n": st.integers(1, 2),
            "n_logprobs": st.sampled_from([-1, -1, 0, 2]),
            "wishes": st.sampled_from(
                [{}, {}, {"repetition_penalty": 1.5}, {"bad_words": ((3,), (4, 5)), "min_tokens": 1}]
            ),
            "prompt_logprobs": st.sampled_from([-1, -1, 1]),
            "stops": st.lists(st.integers(0, 19), max_size=1),
            "abort_after": st.sampled_from([None, None, None, 0, 3, 17]),
        }
    ),
    min_size=1,
    max_size=6,
)
CONFIGS = st.fixed_dictionaries(
    {
        "n_blocks": st.integers(7, 20),
        "max_step_tokens": st.integers(2, 40),
        "max_sequences": st.integers(2, 8),
        "prefix_cache": st.booleans(),
        "evict": st.sampled_from(["lru", "random"]),
    }
)


def serve(made: Engine, asked: list[dict], *, lanes: bool) -> Iterator[tuple[bytes, list[Delta]]]:
    """Every step's bytes and what came of it. Aborts fall between a step's making and its result."""
    scheduler, executor = made.scheduler, made.executor
    tick, left, aborts = 0, sorted(enumerate(asked), key=lambda pair: pair[1]["tick"]), {}
    while left or scheduler.has_work:
        while left and left[0][1]["tick"] <= tick:
            i, one = left.pop(0)
            prompt = tuple((i + j * j) % 20 for j in range(one["n_prompt"]))
            scheduler.add(
                Add(f"r{i}", prompt, one["max_tokens"], i, one["n"], stop_ids=tuple(one["stops"]),
                    n_logprobs=one["n_logprobs"], prompt_logprobs=one["prompt_logprobs"], **one["wishes"])
            )  # fmt: skip
            if one["abort_after"] is not None:
                aborts.setdefault(tick + one["abort_after"], []).append(f"r{i}")
        if not lanes:
            scheduler.leave_lane()
        step = scheduler.schedule(0.0)
        if step is not None:
            result = executor.poll(executor.submit(step))
            for request_id in aborts.pop(tick, ()):
                scheduler.abort(request_id)
            yield step.pack(), scheduler.commit(step, result)
            scheduler.check_integrity()
        tick += 1


@settings(max_examples=60, deadline=None)
@given(asked=ADDS, config=CONFIGS)
def test_lanes_change_nothing(asked: list[dict], config: dict[str, Any]) -> None:
    one, other = (hash_engine(vocab_size=20, **config) for _ in range(2))
    assert list(serve(one, asked, lanes=True)) == list(serve(other, asked, lanes=False))


def test_steady_decoding_stays_in_one_lane() -> None:
    made = hash_engine(n_blocks=40)
    for i in range(4):
        made.add(Add(f"r{i}", (1, 2, 3), 100, 0, temperature=0.0, ignore_eos=True))
    lanes = []
    while made.has_work:
        made.tick(0.0)
        lanes.append(made.scheduler._lane)
    assert len(lanes) == 100
    assert lanes[1] is not None
    assert all(lane is lanes[1] for lane in lanes[1:-1])
