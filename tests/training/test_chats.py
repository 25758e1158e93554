"""Conversations: pairs from docstrings, rows that count the assistant's words alone."""

from __future__ import annotations

import numpy as np

from tenon.training import chats, tokenizer
from tenon.training.chats import Chats, Exchange
from tenon.training.corpus import Document
from tenon.training.recipes import exchanges

SOURCE = '''
def area(width, height):
    """Return the area of a rectangle, given both sides.

    More words.
    """
    return width * height


def silent(x):
    return x
'''


def test_docstring_asks_and_body_answers() -> None:
    (pair,) = chats.from_docstrings([Document("shapes.py", SOURCE)])
    assert pair.user == "Write a Python function `area`: Return the area of a rectangle, given both sides."
    assert pair.assistant == "```python\ndef area(width, height):\n    return width * height\n```"


def test_written_exchanges_are_valid_python_inside_their_fences() -> None:
    for exchange in exchanges.written():
        if exchange.assistant.startswith("```"):
            compile(exchange.assistant.removeprefix("```python\n").removesuffix("```"), "answer", "exec")


def test_rows_begin_with_a_chat_and_count_answers_only() -> None:
    vocabulary = tokenizer.train(["hello there, def f(x): return x"] * 5, 300)
    made = Chats(vocabulary, [Exchange("hi", "def f")], [Exchange("ho", "bye")], seed=1)
    tokens, counted = made.take(iteration=3, batch=4, length=40)
    assert tokens.shape == (4, 41)
    assert counted.shape == (4, 40)
    assert (tokens[:, 0] == vocabulary.token_to_id("<|im_start|>")).all()
    text = vocabulary.decode(tokens[0, 1:][counted[0]].tolist(), skip_special_tokens=False)
    assert set(text.split("<|im_end|>")[:-1]) <= {"def f", "bye"}
    assert np.array_equal(tokens, made.take(3, 4, 40)[0])
    assert not np.array_equal(tokens, made.take(4, 4, 40)[0])
