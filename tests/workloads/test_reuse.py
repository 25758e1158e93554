"""Blocks and reuse against brute force: block identity from real tokens, LRU from a real cache."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads import reuse
from tenon.workloads.blocks import identify
from tenon.workloads.trace import Segment, TraceRequest, prompt_tokens

prompts = st.lists(
    st.lists(st.builds(Segment, st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=14,
)


def requests(prompts_: list[tuple[Segment, ...]]) -> list[TraceRequest]:
    return [TraceRequest(str(i), float(i), prompt, 1) for i, prompt in enumerate(prompts_)]


def prefixes(request: TraceRequest, size: int, partial: bool) -> list[tuple[int, ...]]:
    """Each block as all the tokens up to its end: what identity means."""
    tokens = tuple(prompt_tokens(request, 2**31 - 1).tolist())
    ends = [*range(size, len(tokens) + 1, size)]
    if partial and len(tokens) % size:
        ends.append(len(tokens))
    return [tokens[:end] for end in ends]


@given(prompts, st.integers(1, 8), st.booleans())
def test_blocks_are_equal_exactly_when_all_tokens_up_to_their_end_are(
    prompts_: list[tuple[Segment, ...]], size: int, partial: bool
) -> None:
    made = requests(prompts_)
    blocks = identify(made, size, partial=partial)
    names: dict[tuple[int, ...], int] = {}
    seen: dict[int, tuple[int, ...]] = {}
    for i, request in enumerate(made):
        ids = blocks.id[blocks.start[i] : blocks.start[i + 1]].tolist()
        expected = prefixes(request, size, partial)
        assert len(ids) == len(expected)
        for one, tokens in zip(ids, expected, strict=True):
            assert names.setdefault(tokens, one) == one
            assert seen.setdefault(one, tokens) == tokens
    assert blocks.distinct == len(names)


def lru(blocks: list[list[int]], size: int) -> float:
    """A cache that looks all blocks of a request up, then touches them last first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for ids in blocks:
        hits += sum(one in cache for one in ids)
        total += len(ids)
        for one in reversed(ids):
            cache[one] = None
            cache.move_to_end(one)
        while len(cache) > size:
            cache.popitem(last=False)
    return hits / max(1, total)


@given(prompts, st.integers(1, 4))
def test_lru_ratios_are_those_of_a_cache_at_every_size(prompts_: list[tuple[Segment, ...]], size: int) -> None:
    blocks = identify(requests(prompts_), size)
    found = reuse.find(blocks)
    lists = [blocks.id[a:b].tolist() for a, b in zip(blocks.start, blocks.start[1:], strict=False)]
    sizes = list(range(blocks.distinct + 2))
    assert reuse.lru_hit_ratios(found, sizes) == pytest.approx([lru(lists, one) for one in sizes])
    assert reuse.lru_hit_ratios(found, [10**9])[0] == pytest.approx(found.ideal_hit_ratio)


def test_a_trace_by_hand() -> None:
    # Blocks of 2: a = [A0 A1], b = [A0 A1 B], a, c, with C of its own.
    one = requests([(Segment(1, 4),), (Segment(1, 4), Segment(2, 2)), (Segment(3, 2),), (Segment(1, 4),)])
    found = reuse.find(identify(one, 2))
    assert found.before.tolist() == [-1, -1, 0, 1, -1, -1, 2, 3]
    assert found.ideal_hit_ratio == 0.5
    assert sorted(found.uses().tolist()) == [1, 1, 3, 3]
    assert found.once_share() == 0.5
    assert found.top_share(0.5) == 1.0
    assert found.parents().tolist() == [-1, 0, -1, 1]
    assert found.block_gaps(np.array([0.0, 10.0, 11.0, 30.0])).tolist() == [10.0, 10.0, 20.0, 20.0]
    # When request 3 comes, [C] is newer than A0, which is newer than A1, which is newer than B.
    assert reuse.lru_ranks(found).tolist() == [0, 1, 1, 2]
    assert reuse.lru_hit_ratios(found, [1, 2, 3, 4]) == [1 / 8, 3 / 8, 4 / 8, 4 / 8]


def test_what_most_requests_share_is_no_ones_history() -> None:
    many = requests([(Segment(0, 4), Segment(1 + i // 2, 4)) for i in range(400)])
    found = reuse.find(identify(many, 4))
    assert found.parents().tolist() == [i - 1 if i % 2 else -1 for i in range(400)]
    assert len(found.block_gaps(np.arange(400.0))) == 200


def test_no_requests_have_no_blocks() -> None:
    found = reuse.find(identify([], 16))
    assert (found.ideal_hit_ratio, found.once_share(), found.top_share()) == (0, 0, 0)
    assert reuse.lru_hit_ratios(found, [4]) == [0]


def test_a_block_has_a_token_at_least() -> None:
    with pytest.raises(ConfigError, match="block_tokens must be at least 1, got 0"):
        identify([], 0)
