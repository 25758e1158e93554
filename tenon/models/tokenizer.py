"""``tokenizer.json`` -> ids, and ids -> text, all at once or as they come.

Text is defined over bytes: each token stands for some, a text is the bytes of its tokens in a row, and what is not
UTF-8 in it becomes U+FFFD as Unicode recommends (one per maximal ill-formed part). ``decode`` and ``Detokenizer`` are
the same code, so a stream's pieces add up to the batch's text for every sequence of ids. On valid UTF-8 that is what
``tokenizers`` gives; on ill-formed runs of byte-fallback tokens only the number of U+FFFD differs.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import tokenizers

from tenon.base.errors import CheckpointError, RequestError, UnsupportedModel
from tenon.models.metadata import read_bytes, read_object

FILE_NAME: Final = "tokenizer.json"
CONFIG_NAME: Final = "tokenizer_config.json"
THINK_MARKS: Final = ("<think>", "</think>")
CALL_MARKS: Final = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
"""What models write around calls of tools: tokens that belong to a text, though files may call them special."""
SHORT_CHARS: Final = 4096
"""Longer texts are encoded as a batch of one: the library lets other threads run then, and only then."""


@cache
def _byte_of_char() -> Mapping[str, int]:
    """GPT-2's bijection: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer's decoder turns a token into bytes, read from the steps that ``tokenizer.json`` lists.

    ``lead`` copies of ``lead_char`` are dropped at the start of a text; ``drop_first`` removes that character from the
    first token altogether. Both undo the blank that the tokenizer put before the text.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    drop_first: str | None = None
    lead_char: str = " "
    lead: int = 0

    def token(self, text: str, first: bool) -> bytes:
        """The bytes of one token."""
        if self.byte_level:
            chars = _byte_of_char()
            # A token with a character outside of the bijection is an added one and stands for itself.
            return bytes(chars[c] for c in text) if all(c in chars for c in text) else text.encode()
        if first and self.drop_first is not None:
            text = text.replace(self.drop_first, "")
        for old, new in self.replace:
            text = text.replace(old, new)
        if self.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes.fromhex(text[3:5])
            except ValueError:
                return text.encode()
        return text.encode()


def read_decoding(decoder: Mapping[str, Any] | None, where: str) -> Decoding:
    """What ``tokenizer.json`` means by ``decoder``. Raises ``UnsupportedModel`` for a step that is not implemented."""
    if decoder is None:
        raise UnsupportedModel(f"{where}: a tokenizer without a decoder is not implemented", subject="decoder")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    byte_level = byte_fallback = fused = False
    replace: list[tuple[str, str]] = []
    drop_first, lead_char, lead = None, " ", 0
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and len(steps) == 1:
            byte_level = fused = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Replace" and "String" in step["pattern"] and not fused and not byte_fallback:
            replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not fused and not replace:
            replace.append((step["replacement"], " "))
            drop_first = step["replacement"] if step.get("prepend_scheme", "always") != "never" else None
        elif kind == "Strip" and fused and step["stop"] == 0:
            lead_char, lead = step["content"], step["start"]
        else:
            raise UnsupportedModel(
                f"{where}: decoder step {json.dumps(step)[:120]} is not implemented at its place; implemented are "
                f"ByteLevel alone, Metaspace, and Replace, ByteFallback, Fuse, Strip in this order",
                subject="decoder",
            )
    return Decoding(byte_level, byte_fallback, tuple(replace), drop_first, lead_char, lead)


def _is_panic(error: BaseException) -> bool:
    """Whether an assertion of the library has failed, which is no ``Exception``."""
    return type(error).__module__ == "pyo3_runtime"


class Tokenizer:
    """Text <-> ids of one model. Safe to share between threads.

    ``bos_token`` and ``eos_token`` are the strings that templates see; ``special_ids`` are the tokens that ``decode``
    leaves out.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], where: str = FILE_NAME) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self._decoding = read_decoding(state, where)
        self._bytes: dict[int, bytes] = {}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token, self.bos_id = self._named(config, "bos_token")
        self.eos_token, self.eos_id = self._named(config, "eos_token")
        self.pad_token, self.pad_id = self._named(config, "pad_token")
        marks = [self.token_id(mark) for mark in THINK_MARKS]
        self.think = (marks[0], marks[1]) if marks[0] is not None and marks[1] is not None else None
        """The tokens between which a model that reasons thinks, where they are tokens of its own."""

    def _named(self, config: Mapping[str, Any], name: str) -> tuple[str | None, int | None]:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None, None
        found = self._backend.token_to_id(text) if isinstance(text, str) else None
        if found is None:
            raise CheckpointError(f"{CONFIG_NAME}: {name} {text!r:.80} is not a token of {self._where}", subject=name)
        return text, found

    def spellings(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens as the tokenizer writes it at the start of a text and after a blank, where they differ."""
        found = {tuple(self.encode(text)): None for word in words for text in (word, " " + word.lstrip())}
        return tuple(ids for ids in found if ids)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """The ids of ``text``; special tokens written out in it count as such.

        ``add_special`` adds what the model wants around a plain text (often bos); a chat template writes that itself.
        Raises ``RequestError`` for text that is not Unicode (a lone surrogate), ``CheckpointError`` where the file
        turns out to be damaged.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}", code="invalid_unicode"
            ) from error
        try:
            if len(text) <= SHORT_CHARS:
                made = self._backend.encode(text, add_special_tokens=add_special)
            else:
                made = self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0]
        except BaseException as error:
            if not _is_panic(error):
                raise
            said = f"{self._where} is damaged: the tokenizer fails on a text: {str(error)[:200]}"
            raise CheckpointError(said, subject=FILE_NAME) from error
        ids: list[int] = made.ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; special tokens are left out unless told otherwise, unknown ids always."""
        stream = Detokenizer(self, skip_special=skip_special)
        return stream.push(ids) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id adds inside a text; empty for an id that the tokenizer does not have."""
        found = self._bytes.get(token)
        if found is None:
            text = self._backend.id_to_token(token)
            found = self._bytes[token] = b"" if text is None else self._decoding.token(text, first=False)
        return found

    def _first_bytes(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        return b"" if text is None else self._decoding.token(text, first=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its name in the vocabulary, if there is one."""
        found: int | None = self._backend.token_to_id(token)
        return found


def is_thinking(prompt: Sequence[int], think: tuple[int, int] | None) -> bool:
    """Whether the prompt ends inside a thought: its template has begun one for the model."""
    if think is None:
        return False
    last = next((token for token in reversed(prompt) if token in think), None)
    return last == think[0]


class Detokenizer:
    """Text of one sequence as its ids come: each ``push`` returns what is new and whole.

    A character whose bytes are not all there yet is held back until they are, until it turns out ill-formed, or until
    ``flush``. ``at_start=False`` says that text precedes (a prompt), so that a leading blank is kept. The cost of a
    token does not depend on how many went before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        at_start: bool = True,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        """``keep``: special tokens that stay all the same."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - keep if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = at_start
        self._lead = tokenizer._decoding.lead if at_start else 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete; empty while a character is still open."""
        parts = []
        for token in ids:
            if token in self._skip:
                continue
            parts.append(self._tokenizer._first_bytes(token) if self._first else self._tokenizer.token_bytes(token))
            self._first = False
        return self._strip(self._utf8.decode(b"".join(parts)))

    def flush(self) -> str:
        """What was held back, as U+FFFD, at the end of the sequence."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._lead and text:
            if not text.startswith(self._tokenizer._decoding.lead_char):
                self._lead = 0
                break
            text, self._lead = text[1:], self._lead - 1
        return text


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of the checkpoint in ``folder``.

    ``vocab_size`` is the model's: a token beyond it would read past the embedding. Raises ``CheckpointError`` for files
    that are missing, damaged or do not fit the model, ``UnsupportedModel`` for a decoder that is not implemented.
    """
    path = folder / FILE_NAME
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise UnsupportedModel(
            f"{folder} has only tokenizer.model; Tenon reads {FILE_NAME}: save the tokenizer in that format first",
            subject=FILE_NAME,
        )
    data = read_bytes(path)
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except BaseException as error:  # the library raises nothing narrower than Exception, and panics besides
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or of an unknown kind: {reason}", subject=FILE_NAME) from error
    config = read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    tokenizer = Tokenizer(backend, config, str(path))
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path} has tokens up to id {tokenizer.vocab_size - 1}, the model embeds ids below {vocab_size} only",
            subject=FILE_NAME,
        )
    return tokenizer
