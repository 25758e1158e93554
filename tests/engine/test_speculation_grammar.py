"""Grammars and guesses: masks follow each node's path, and what is told is what plain decoding tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tenon.engine.grammar import Masks
from tenon.engine.messages import Add, Grammar
from tenon.engine.structure import Structure, json_schema
from tests.engine.build import told
from tests.engine.test_grammar import PERSON, Bench

FORMS = {
    "words": Structure("regex", "((ab|abc|b)( |,)){30}"),
    "schema": json_schema(PERSON, "p"),
    "nested": Structure("ebnf", 'root ::= "(" [01]+ ")" | "<" root ">"'),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    made.masks = Masks(made.vocabulary, n_rows=400)
    yield made
    made.compiler.close()
    made.masks.close()


def requests(bench: Bench) -> list[Add]:
    """With and without a grammar; some bias, so that what is said repeats itself."""
    bias = tuple((token, 6.0) for token in bench.tokenizer.encode("ab ab, b abc 01", add_special=False))
    rest = {"max_tokens": 50, "logit_bias": bias, "n_logprobs": 1}
    adds = [
        bench.add(f"{name}-{temperature}", form, temperature=temperature, seed=3, n=2, **rest)
        for name, form in FORMS.items()
        for temperature in (0.0, 0.8)
    ]
    return [*adds, Add("free", (5, 6, 7) * 9, 50, 5, temperature=0.7, logit_bias=bias)]


@pytest.mark.parametrize("drafters", ["suffix", "ngram,suffix,draft"])
@pytest.mark.parametrize("n_blocks", [300, 24])
def test_outputs_with_a_grammar_are_the_same(bench: Bench, drafters: str, n_blocks: int) -> None:
    plain = told(bench.engine(), requests(bench))
    made = bench.engine(n_blocks, speculative=drafters, speculative_policy="fixed-tree", draft_blocks=100)
    assert told(made, requests(bench)) == plain
    assert made.scheduler.speculation.counts.accepted > 30  # type: ignore[union-attr]
    assert {one.reason for one in plain.values()} == {"stop", "length"}
    assert made.stats(0.0).blocks_held == 0


def test_a_grammar_begins_to_bind_where_a_thought_ends(bench: Bench) -> None:
    """Within a tree too: the marks are never guessed, so that no node is masked as if it stood before them."""
    opening, closing = (
        bench.tokenizer.encode("(", add_special=False)[0],
        bench.tokenizer.encode(")", add_special=False)[0],
    )
    grammar = Grammar(*bench.compiler.compile(FORMS["words"]), think=(opening, closing), thinking=True)
    free = tuple((token, 9.0) for token in (*bench.tokenizer.encode("ab ab,", add_special=False), closing))
    adds = [
        Add(f"r{i}", (5, 6, 7) * 4, 60, i, grammar=grammar, temperature=0.9, logit_bias=free, n_logprobs=0)
        for i in range(4)
    ]
    plain = told(bench.engine(), adds)
    assert sum(closing in one.ids for one in plain.values()) > 1
    made = bench.engine(speculative="ngram,suffix", speculative_policy="fixed-tree")
    assert told(made, adds) == plain
    assert made.scheduler.speculation.counts.accepted > 20  # type: ignore[union-attr]


def test_aborts_while_masks_of_trees_are_on_their_way(bench: Bench) -> None:
    made = bench.engine(60, speculative="ngram,suffix,draft", speculative_policy="fixed-tree")
    for add in requests(bench):
        made.add(add)
    for step in range(30):
        made.tick(0.0)
        made.check_integrity()
        if step % 4 == 3 and made.scheduler.requests:
            made.abort(next(iter(made.scheduler.requests)))
            made.check_integrity()
    for name in list(made.scheduler.requests):
        made.abort(name)
    made.check_integrity()
    assert made.stats(0.0).blocks_held == 0
