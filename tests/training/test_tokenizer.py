"""The tokenizer: any text comes back, blanks of Python stay together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tenon.training import tokenizer


def made() -> Tokenizer:
    return tokenizer.train(["class A:\n    def f(self):\n        return self.value_of(12)\n"] * 20, 320)


MADE = made()


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_back(text: str) -> None:
    assert MADE.decode(MADE.encode(text).ids) == text


@pytest.mark.parametrize("text", ["x = 1\n\n\n    y\t= 2  \n", "été — 漢字\r\n", "  ", "\n"])
def test_blanks_and_other_scripts_come_back(text: str) -> None:
    assert MADE.decode(MADE.encode(text).ids) == text


def test_special_tokens_come_first() -> None:
    assert [MADE.token_to_id(t) for t in tokenizer.SPECIAL] == [0, 1, 2, 3]


def test_line_end_and_indentation_stay_together() -> None:
    pieces = [piece for piece, _ in MADE.pre_tokenizer.pre_tokenize_str("if x:\n        y.z")]
    assert pieces == ["if", "Ġx", ":ĊĠĠĠĠĠĠĠĠ", "y", ".z"]


def test_training_twice_gives_the_same_tokens() -> None:
    assert made().to_str() == MADE.to_str()
