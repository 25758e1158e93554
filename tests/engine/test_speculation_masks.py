"""Masks of trees: at each node the one that plain decoding would have there, and none of it is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tenon.engine.grammar import Masks
from tenon.engine.messages import Add, Grammar
from tenon.engine.sequence import Request, Seq
from tenon.engine.speculation.tree import ROOT, Tree
from tenon.engine.step import U32
from tenon.engine.structure import Structure, json_schema
from tests.engine.build import told
from tests.engine.test_grammar import PERSON, PROMPT, Bench
from tests.engine.trees import MAX_NODES, Scripted, speculating

FORMS = {
    "words": Structure("regex", "((ab|abc|b)( |,)){30}"),
    "schema": json_schema(PERSON, "p"),
    "nested": Structure("ebnf", 'root ::= "(" [01]+ ")" | "<" root ">"'),
    "tight": Structure("regex", "a{40}"),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    made.masks = Masks(made.vocabulary, n_rows=200)
    yield made
    made.compiler.close()
    made.masks.close()


class Asking:
    """Sequences by hand, and the masks that are made for them."""

    def __init__(self, bench: Bench, form: str, **thinking: Any) -> None:
        self._bench, self._n_made = bench, 0
        self._grammar = Grammar(*bench.compiler.compile(FORMS[form]), **thinking)
        self.stops = frozenset(bench.eos_ids)

    def sequence(self, output: list[int], tree: Tree | None = None) -> Seq:
        self._n_made += 1
        add = Add("r", PROMPT, 200, 0, grammar=self._grammar, outputs=tuple(output))
        request = Request(add, 0, bytes(32), bytes(32), self.stops)
        seq = Seq(self._n_made, request, 0, 1, 16, MAX_NODES)
        request.seqs.append(seq)
        seq.tree = tree
        return seq

    def masks(self, *seqs: Seq) -> U32:
        """Of all their rows, one after the other."""
        masks = self._bench.masks
        while masks.late(seqs, ()):
            masks.wait()
        assert masks.take_failed() == {}
        return masks.rows([(seq, 1 if seq.tree is None else 1 + len(seq.tree)) for seq in seqs])

    def plain(self, outputs: list[list[int]]) -> U32:
        """Of sequences that really say this."""
        return self.masks(*(self.sequence(output) for output in outputs))

    def grow(self, rng: np.random.Generator, output: list[int], n: int) -> Tree:
        """A tree of ``n`` nodes below ``output``: most may come there, some may not."""
        tokens: list[int] = []
        parents: list[int] = []
        rows = {ROOT: self.plain([output])[0]}
        for i in range(n):
            parent = int(rng.choice(list(rows)))
            right = [token for token in ids_of(rows[parent]) if token not in self.stops]
            takes = bool(right) and rng.random() < 0.75
            token = int(rng.choice(right)) if takes else int(rng.integers(3, 400))
            tokens.append(token)
            parents.append(parent)
            if token in right:
                rows[i] = self.plain([[*output, *Tree(tokens, parents).path(i)]])[0]
        return Tree(tokens, parents)


def ids_of(mask_W: U32) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist()


def may_come(mask_W: U32, token: int) -> bool:
    return bool(mask_W[token // 32] >> np.uint32(token % 32) & 1)


@pytest.mark.parametrize("form", FORMS)
def test_each_node_s_mask_is_plain_decoding_s(bench: Bench, form: str) -> None:
    """And that of a node which its grammar does not take, or which is below one, is empty."""
    rng, it = np.random.default_rng(len(form)), Asking(bench, form)
    n_taken = 0
    for _ in range(4):
        output: list[int] = []
        tree = it.grow(rng, output, 7)
        found = it.masks(it.sequence(output, tree))
        rows: dict[int, U32] = {ROOT: found[0]}
        for i, parent in enumerate(tree.parents):
            if parent in rows and may_come(rows[parent], tree.tokens[i]):
                rows[i] = found[1 + i]
            else:
                assert not found[1 + i].any()
        right = it.plain([[*output, *tree.path(node)] for node in rows])
        assert np.array_equal(np.stack(list(rows.values())), right)
        n_taken += len(rows)
    assert 8 < n_taken < 32


def test_a_matcher_stands_where_it_stood(bench: Bench) -> None:
    """Trees come and go, tokens come of their paths and of others: each mask is that of the tokens alone."""
    rng, it = np.random.default_rng(4), Asking(bench, "schema")
    seq = it.sequence([])
    for _ in range(10):
        output = seq.tokens[seq.n_prompt : seq.n_tokens].tolist()
        seq.tree = it.grow(rng, output, 5)
        with_tree = it.masks(seq)
        seq.tree = None
        (alone,) = it.masks(seq)
        assert np.array_equal(alone, with_tree[0])
        assert np.array_equal(alone, it.plain([output])[0])
        new = [int(rng.choice([token for token in ids_of(alone) if token not in it.stops] or [-1]))]
        if new == [-1]:
            break
        seq.tokens[seq.n_tokens] = new[0]
        seq.n_tokens += 1
    assert seq.n_output > 5


def test_sequences_with_and_without_trees_are_asked_for_together(bench: Bench) -> None:
    rng, it = np.random.default_rng(6), Asking(bench, "words")
    trees = [it.grow(rng, [], n) for n in (1, 4, 6)]
    alone = [it.masks(it.sequence([], tree)) for tree in trees]
    mixed = it.masks(it.sequence([], trees[0]), it.sequence([]), *(it.sequence([], tree) for tree in trees[1:]))
    assert np.array_equal(mixed, np.concatenate((alone[0], alone[0][:1], *alone[1:])))


def test_a_thought_is_free_at_every_node_and_begins_at_none(bench: Bench) -> None:
    thinking = Asking(bench, "words", think=(40, 41), thinking=True)
    found = thinking.masks(thinking.sequence([50, 51], Tree([60, 61, 62], [ROOT, 0, ROOT])))
    free = [token for token in range(len(found[0]) * 32) if token not in thinking.stops]
    assert all(ids_of(row) == free for row in found)
    it = Asking(bench, "words", think=(40, 41))
    first = it.plain([[]])[0]
    assert may_come(first, 40)
    token = next(token for token in ids_of(first) if token != 40)
    found = it.masks(it.sequence([], Tree([token], [ROOT])))
    assert np.array_equal(found[0], first)
    assert not may_come(found[1], 40)


@pytest.mark.parametrize("parents", [[ROOT], [ROOT, 0], [ROOT, ROOT, 0]])
@pytest.mark.parametrize("max_step_tokens", [1024, 9])
def test_guesses_that_a_grammar_does_not_take_cost_nothing(
    bench: Bench, parents: list[int], max_step_tokens: int
) -> None:
    """Wherever the rows of such a tree stand: beside a prompt, too, of which a part is computed and nothing sampled."""
    adds = [bench.add("bound", FORMS["tight"], max_tokens=30, n_logprobs=0), Add("prompt", PROMPT * 30, 5, 1)]
    plain = told(bench.engine(max_step_tokens=max_step_tokens), adds)
    wrong = bench.tokenizer.encode("z", add_special=False)[0]
    tree = Tree([wrong + i for i in range(len(parents))], parents)
    made = bench.engine(max_step_tokens=max_step_tokens)
    assert told(speculating(made, [Scripted(lambda seq: tree if seq.binding else None)]), adds) == plain
    counts = made.scheduler.speculation.counts  # type: ignore[union-attr]
    assert counts.trees > 10
    assert counts.accepted == 0
