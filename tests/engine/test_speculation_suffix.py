"""Guesses from suffixes: what followed the longest one, counted by hand; in C and in Python the same, whoever comes,
goes, and shares what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.engine.messages import Add
from tenon.engine.policies.forest import Forest
from tenon.engine.sequence import Request, Seq, State
from tenon.engine.speculation.automaton import BOUNDS, MOST_EDGES, ROOT, Automaton, Node, bucket
from tenon.engine.speculation.ngram import LONGEST, SHORTEST, Ngram
from tenon.engine.speculation.suffix import DOUBT, FLOOR, MAX_TENANTS, OF_PROMPT, SHARED_TOKENS, Suffix

STRINGS = st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=4)


def automaton_of(strings: Sequence[Sequence[int]]) -> Automaton:
    made = Automaton()
    for string in strings:
        made.begin()
        made.add(string)
    return made


def followers(strings: Sequence[Sequence[int]], context: Sequence[int]) -> Counter[int]:
    """What has followed ``context`` in the strings, and how often."""
    n, context = len(context), list(context)
    found: Counter[int] = Counter()
    for string in strings:
        found.update(string[i + n] for i in range(len(string) - n) if list(string[i : i + n]) == context)
    return found


def stands_in(strings: Sequence[Sequence[int]], context: Sequence[int]) -> bool:
    n, context = len(context), list(context)
    return any(list(string[i : i + n]) == context for string in strings for i in range(len(string) - n + 1))


def best_guesses(
    strings: Sequence[Sequence[int]], context: Sequence[int], depth: int, room: int, doubt: float, floor: float
) -> list[float]:
    """Of the ``room`` likeliest paths below ``context`` how likely they are: shares of counts along each."""
    found: list[float] = []

    def look(path: tuple[int, ...], p: float) -> None:
        counts = followers(strings, [*context, *path])
        for token, count in counts.items():
            q = p * count / (counts.total() + doubt)
            if q >= floor:
                found.append(q)
                if len(path) + 1 < depth:
                    look((*path, token), q)

    look((), 1.0)
    return sorted(found, reverse=True)[:room]


def paths(nodes: Sequence[Node]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent, _, _, _ in nodes:
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def check_guesses(
    nodes: list[Node], strings: Sequence[Sequence[int]], context: Sequence[int], depth: int, room: int, doubt: float,
    floor: float,
) -> None:  # fmt: skip
    likely: list[float] = []
    for (token, parent, at, rank, q), path in zip(nodes, paths(nodes), strict=True):
        counts = followers(strings, [*context, *path[:-1]])
        assert at == len(path)
        assert q == pytest.approx(counts[token] / (counts.total() + doubt))
        assert rank < len(counts)
        assert sum(count > counts[token] for count in counts.values()) <= rank
        likely.append(q * (likely[parent] if parent >= 0 else 1.0))
    assert likely == pytest.approx(best_guesses(strings, context, depth, room, doubt, floor))


@settings(max_examples=150)
@given(strings=STRINGS, context=st.lists(st.integers(0, 3), max_size=12), depth=st.integers(1, 4),
       room=st.integers(1, 12))  # fmt: skip
def test_a_context_is_matched_by_its_longest_suffix(
    strings: list[list[int]], context: list[int], depth: int, room: int
) -> None:
    """In strings that others have said."""
    made = automaton_of(strings)
    state, length = ROOT, 0
    for i, token in enumerate(context):
        state, length = made.advance(state, length, token)
        here = context[: i + 1]
        right = max(n for n in range(len(here) + 1) if stands_in(strings, here[len(here) - n :]))
        assert length == right
    matched = context[len(context) - length :]
    check_guesses(made.guess(state, depth, room, DOUBT, 0.0), strings, matched, depth, room, DOUBT, 0.0)


@settings(max_examples=150)
@given(string=st.lists(st.integers(0, 2), min_size=1, max_size=50), depth=st.integers(1, 4), room=st.integers(1, 12),
       floor=st.sampled_from([0.0, 0.05, 0.3]))  # fmt: skip
def test_a_sequence_s_end_is_matched_where_it_stood_before(
    string: list[int], depth: int, room: int, floor: float
) -> None:
    made = Automaton()
    for token in string:
        made.add([token])
    state = max(ROOT, made.link[made.last])
    earlier = string[:-1]
    length = max(n for n in range(len(string)) if stands_in([earlier], string[len(string) - n :]))
    assert made.length[state] == length
    tail = string[len(string) - length :]
    check_guesses(made.guess(state, depth, room, DOUBT, floor), [string], tail, depth, room, DOUBT, floor)


@settings(max_examples=150)
@given(first=STRINGS, then=STRINGS, context=st.lists(st.integers(0, 2), min_size=1, max_size=10))
def test_a_match_stands_while_the_strings_grow(
    first: list[list[int]], then: list[list[int]], context: list[int]
) -> None:
    """States are split under who has come to them: for the same suffix the one that it is in now is looked up."""
    made = automaton_of(first)
    state, length = ROOT, 0
    for token in context:
        state, length = made.advance(state, length, token)
    for string in then:
        made.begin()
        made.add(string)
    state, matched = made.settled(state, length), context[len(context) - length :]
    strings = [*first, *then]
    check_guesses(made.guess(state, 3, 10, DOUBT, 0.0), strings, matched, 3, 10, DOUBT, 0.0)


def test_what_may_be_followed_by_too_much_says_nothing() -> None:
    few, many = range(MOST_EDGES), range(MOST_EDGES + 1)
    assert automaton_of([[99, token] for token in few]).guess(1, 1, 64, DOUBT, 0.0) != []
    assert automaton_of([[99, token] for token in many]).guess(1, 1, 64, DOUBT, 0.0) == []


# -- in C and in Python ------------------------------------------------------------------------------------------


def sequence(seq_id: int, tokens: Sequence[int], n_prompt: int, tenant: int = 0, room: int = 200) -> Seq:
    add = Add(
        f"r{seq_id}", tuple(tokens[:n_prompt]), len(tokens) - n_prompt + room, 0, outputs=tuple(tokens[n_prompt:])
    )
    request = Request(add, seq_id, bytes(32), tenant.to_bytes(32, "little"), frozenset())
    seq = Seq(seq_id, request, 0, 1, 16, 16)
    request.seqs.append(seq)
    return seq


def grow(seq: Seq, tokens: Sequence[int]) -> None:
    seq.tokens[seq.n_tokens : seq.n_tokens + len(tokens)] = tokens
    seq.n_tokens += len(tokens)


def nodes_of(forest: Forest | None, i: int) -> list[tuple[float, ...]]:
    """A row's nodes with all that is said of them."""
    if forest is None:
        return []
    k = int(np.count_nonzero(forest.depth[i]))
    assert not forest.depth[i, k:].any()
    names = ("token", "parent", "depth", "rank", "source", "q")
    return list(zip(*(getattr(forest, name)[i, :k].tolist() for name in names), strict=True))


class Twins:
    """One drafter in C and one in Python, told the same."""

    def __init__(self) -> None:
        self.both = Suffix(), Suffix(in_c=False)
        assert self.both[0].lib is not None
        assert self.both[1].lib is None

    def propose(self, seqs: Sequence[Seq], depths: Sequence[int], room: int) -> list[list[tuple[float, ...]]]:
        depth_n = np.array(depths, np.int32)
        one, other = (it.propose(seqs, depth_n, room) for it in self.both)
        found = [nodes_of(one, i) for i in range(len(seqs))]
        assert found == [nodes_of(other, i) for i in range(len(seqs))]
        assert (one is None) == (other is None) == (not any(found))
        return found

    def forget(self, seq: Seq) -> None:
        for it in self.both:
            it.forget(seq)

    def reset(self) -> None:
        for it in self.both:
            it.reset()

    def close(self) -> None:
        for it in self.both:
            it.close()


def finish(twins: Twins, seq: Seq) -> None:
    seq.state = State.FINISHED
    twins.forget(seq)


@pytest.mark.parametrize("seed", range(12))
def test_in_c_the_same_is_guessed(seed: int) -> None:
    """Sequences of three tenants grow, are passed over, end, are dropped; now and then all is forgotten."""
    rng, twins, n_nodes, n_shared = np.random.default_rng(seed), Twins(), 0, 0
    vocab_size, seqs, n_made = int(rng.choice([2, 4, 40])), [], 0
    for _ in range(200):
        if len(seqs) < 6 and rng.random() < 0.4:
            tokens = rng.integers(0, vocab_size, int(rng.integers(2, 30))).tolist()
            seqs.append(sequence(n_made, tokens, int(rng.integers(1, len(tokens) + 1)), int(rng.integers(3))))
            n_made += 1
        asked = [seq for seq in seqs if rng.random() < 0.7]
        room = int(rng.choice([1, 5, 16, 256]))
        found = twins.propose(asked, rng.integers(-1, 9, len(asked)).tolist(), room) if asked else []
        n_nodes += sum(map(len, found))
        n_shared += sum(node[4] > len(BOUNDS) for nodes in found for node in nodes)
        for seq in seqs:
            grow(seq, rng.integers(0, vocab_size, int(rng.integers(1, 6))).tolist())
        for seq in [seq for seq in seqs if rng.random() < 0.08 or seq.room < 10]:
            seqs.remove(seq)
            finish(twins, seq) if rng.random() < 0.8 else twins.forget(seq)
        if rng.random() < 0.02:
            twins.reset()
    twins.close()
    assert n_nodes > 300
    assert n_shared > 10


def test_two_generations_are_shared_and_the_oldest_is_forgotten() -> None:
    """In C as in Python, for who comes later and who was there before, whose last tokens are looked up anew."""
    rng, twins = np.random.default_rng(1), Twins()
    marks = [[1000 + 10 * k + i for i in range(6)] for k in range(4)]
    early = sequence(0, [5, 6, 7], 3)
    twins.propose([early], [4], 8)
    for k, mark in enumerate(marks):
        seq = sequence(1 + k, [2, *rng.integers(0, 500, SHARED_TOKENS).tolist(), *mark, 1], 1)
        for it in twins.both:
            it.numbers([seq])
        finish(twins, seq)
        late = [sequence(10 * k + 20 + j, [3, *known[:3]], 4) for j, known in enumerate(marks)]
        found = [[node[0] for node in nodes[:3]] for nodes in twins.propose([early, *late], [3] * 5, 8)]
        assert [marks[j][3:] == found[1 + j] for j in range(4)] == [k - 2 < j <= k for j in range(4)]
        assert k == 0 or found[0] == marks[k - 1][3:]  # by its end of the last time
        grow(early, mark[:3])
        ((*nodes,),) = twins.propose([early], [3], 8)
        assert [node[0] for node in nodes[:3]] == mark[3:]
        for seq in late:
            twins.forget(seq)
    twins.close()


def test_nobody_s_words_are_told_to_another_tenant() -> None:
    twins = Twins()
    said = sequence(0, [9, 1, 2, 3, 4, 5, 6], 1, tenant=1)
    twins.propose([said], [4], 8)
    finish(twins, said)
    mine, theirs = sequence(1, [8, 1, 2, 3], 4, tenant=1), sequence(2, [8, 1, 2, 3], 4, tenant=2)
    found = twins.propose([mine, theirs], [4, 4], 8)
    assert [node[0] for node in found[0]] == [4, 5, 6]
    assert found[1] == []
    twins.reset()
    assert twins.propose([mine, theirs], [4, 4], 8) == [[], []]
    twins.close()


def test_the_tenant_that_has_said_nothing_for_longest_is_forgotten() -> None:
    twins = Twins()
    for tenant in range(MAX_TENANTS + 1):
        said = sequence(tenant, [9, 1, 2, 3, 4 + tenant], 1, tenant)
        twins.propose([said], [4], 8)
        finish(twins, said)
    asked = [sequence(100 + tenant, [8, 1, 2, 3], 4, tenant) for tenant in range(MAX_TENANTS + 1)]
    found = twins.propose(asked, [1] * len(asked), 8)
    assert [[node[0] for node in nodes] for nodes in found] == [[], *([4 + t] for t in range(1, MAX_TENANTS + 1))]
    twins.close()


def test_what_is_dropped_teaches_nothing_and_prompts_little() -> None:
    """Only what was said to the end is shared, with the prompt's last tokens before it."""
    twins = Twins()
    prompt = list(range(50, 50 + OF_PROMPT + 3))
    dropped, ended = sequence(0, [9, 1, 2, 3], 1), sequence(1, [*prompt, 20, 21], len(prompt))
    twins.propose([dropped, ended], [4, 4], 8)
    twins.forget(dropped)
    finish(twins, ended)
    asked = [sequence(2, [9, 1, 2], 3), sequence(3, prompt[:2], 2), sequence(4, prompt[-2:], 2)]
    found = twins.propose(asked, [2, 2, 2], 8)
    assert [[node[0] for node in nodes] for nodes in found] == [[], [], [20, 21]]
    twins.close()


def test_kinds_are_whose_match_it_is_and_how_long() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 500)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(Suffix.kinds) == 2 * (len(BOUNDS) + 1)
    twins = Twins()
    ((node, *_),) = twins.propose([sequence(0, [1, 2, 3, 4, 5, 1, 2, 3], 8)], [1], 8)
    assert Suffix.kinds[int(node[4])] == "own-3"
    assert node[5] == pytest.approx(1 / (1 + DOUBT))
    assert node[5] > FLOOR
    twins.close()


# -- runs of tokens ------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(string=st.lists(st.integers(0, 3), min_size=1, max_size=40), depth=st.integers(1, 6), room=st.integers(1, 6),
       n_prompt=st.integers(1, 40))  # fmt: skip
def test_an_ngram_s_guess_is_what_followed_its_latest_place(
    string: list[int], depth: int, room: int, n_prompt: int
) -> None:
    """Told step by step, as a sequence grows."""
    drafter, n_prompt = Ngram(), min(n_prompt, len(string))
    seq = sequence(0, string[:n_prompt], n_prompt)
    for i in range(n_prompt, len(string) + 1):
        said = string[:i]
        right: list[int] = []
        for n in range(min(LONGEST, i), SHORTEST - 1, -1):
            ends = [end for end in range(n, i) if said[end - n : end] == said[i - n :]]
            if ends:
                right = said[ends[-1] : ends[-1] + min(depth, room)]
                break
        forest = drafter.propose([seq], np.array([depth], np.int32), room)
        assert [node[0] for node in nodes_of(forest, 0)] == right
        if i < len(string):
            grow(seq, [string[i]])
