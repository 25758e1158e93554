"""Conversations to learn from: docstring and body of the training split's functions, and written exchanges.

Only the assistant's words and the token that ends them are counted in the loss.

Shapes: B rows of S tokens.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tenon.training.corpus import Document
from tenon.training.rows import Tokens
from tenon.training.tokenizer import END_OF_TEXT, IM_END, IM_START, special_id

MAX_DOCSTRING, MAX_SOURCE = 240, 700
WRITTEN_SHARE = 0.75


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    user: str
    assistant: str


def fenced(source: str) -> str:
    return f"```python\n{source.rstrip()}\n```"


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions at top level and methods of classes there."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (inner for inner in node.body if isinstance(inner, ast.FunctionDef))


def from_docstrings(documents: Iterable[Document]) -> list[Exchange]:
    """Short functions with a docstring: its first paragraph asks, the function without it answers."""
    found: list[Exchange] = []
    for document in documents:
        lines = document.text.split("\n")
        for node in _functions(ast.parse(document.text)):
            doc = ast.get_docstring(node)
            if not doc or len(node.body) < 2 or node.decorator_list:
                continue
            asked = " ".join(doc.split("\n\n")[0].split())
            after_doc = node.body[0].end_lineno or node.lineno
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            source = textwrap.dedent("\n".join([*head, *lines[after_doc : node.end_lineno]]))
            if 20 <= len(asked) <= MAX_DOCSTRING and len(source) <= MAX_SOURCE and head:
                found.append(Exchange(f"Write a Python function `{node.name}`: {asked}", fenced(source)))
    return found


@dataclass(frozen=True)
class Encoded:
    """One exchange as tokens; ``counted`` marks those that the loss looks at."""

    tokens: Tokens
    counted: NDArray[np.bool_]


def encode(tokenizer: Tokenizer, exchange: Exchange) -> Encoded:
    """In the chat template's own form; prompt and answer are encoded apart, as they are when served."""
    prompt = f"{IM_START}user\n{exchange.user}{IM_END}\n{IM_START}assistant\n"
    asked = tokenizer.encode(prompt).ids
    answered = tokenizer.encode(exchange.assistant + IM_END).ids
    after = tokenizer.encode("\n").ids
    tokens = np.array([*asked, *answered, *after], np.uint16)
    counted = np.zeros(len(tokens), np.bool_)
    counted[len(asked) : len(asked) + len(answered)] = True
    return Encoded(tokens, counted)


class Chats:
    """Rows that begin with a conversation and are filled with further ones, drawn by (seed, iteration)."""

    def __init__(self, tokenizer: Tokenizer, pairs: list[Exchange], written: list[Exchange], seed: int) -> None:
        self.pairs, self.written = ([encode(tokenizer, e) for e in pool] for pool in (pairs, written))
        self.filler = special_id(tokenizer, END_OF_TEXT)
        self.seed = seed

    def take(self, iteration: int, batch: int, length: int) -> tuple[Tokens, NDArray[np.bool_]]:
        """Tokens (B, S + 1) and, for each target, whether it counts (B, S). ``WRITTEN_SHARE`` are written ones."""
        rng = np.random.default_rng((self.seed, iteration))
        tokens = np.full((batch, length + 1), self.filler, np.uint16)
        counted = np.zeros((batch, length + 1), np.bool_)
        for row in range(batch):
            at = 0
            while at < length:
                pool = self.written if rng.random() < WRITTEN_SHARE else self.pairs
                chat = pool[int(rng.integers(len(pool)))]
                n = min(len(chat.tokens), length + 1 - at)
                tokens[row, at : at + n] = chat.tokens[:n]
                counted[row, at : at + n] = chat.counted[:n]
                at += n
        return tokens, counted[:, 1:]
