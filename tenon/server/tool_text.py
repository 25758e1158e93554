"""Calls in a text that grows: which parts are content, which name a function, which are its arguments.

    text   [ content ... | opening | {"name": "f", "arguments": {...}} | closing | content ... ]

A function's name is told once it is whole, its arguments as they come. What begins like a call and is none is content,
to the last character. Nothing is parsed but JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from tenon.models.tokenizer import CALL_MARKS
from tenon.server.tools import Dialect

_BLANKS: Final = " \n\r\t"


@dataclass(frozen=True)
class CallPart:
    """A piece of call ``index``. ``name`` is set on its first piece, which has no arguments."""

    index: int
    name: str | None
    arguments: str = ""


class _Object:
    """A call's JSON object as it comes: finds its name, and the span of its arguments' value.

    ``take`` returns how many characters belong to it; ``done`` is set at its closing brace, ``broken`` where it turns
    out to be no call.
    """

    def __init__(self, arguments_key: str) -> None:
        self._keys = {arguments_key, "arguments", "parameters"}
        self.text = ""
        self.name: str | None = None
        self.start: int | None = None
        self.end: int | None = None
        self.done = self.broken = False
        self._depth = 0
        self._string_at: int | None = None
        self._escaped = False
        self._key: str | None = None
        self._value_at: int | None = None
        """Where the value of the present member begins, once its colon has been seen."""
        self._in_value = False

    def take(self, text: str) -> int:
        for n, char in enumerate(text):
            self.text += char
            self._see(char, len(self.text) - 1)
            if self.done or self.broken:
                return n + 1
        return len(text)

    def _see(self, char: str, at: int) -> None:
        if self._string_at is not None:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                start, self._string_at = self._string_at, None
                if self._depth == 1:
                    self._string(self.text[start : at + 1], at)
            return
        if at == 0:
            self.broken = char != "{"
            self._depth = 1
            return
        if char == '"':
            self._string_at = at
            self._begin_value(at)
        elif char in "{[":
            self._begin_value(at)
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._end_value(at + 1)
            elif self._depth == 0:
                self._end_value(at)
                self.done = char == "}" and self.name is not None
                self.broken = not self.done
        elif self._depth == 1 and char == ":":
            self._in_value = True
        elif self._depth == 1 and char == ",":
            self._end_value(at)
            self._key, self._in_value, self._value_at = None, False, None
        elif char not in _BLANKS:
            self._begin_value(at)
            self.broken = self._depth == 1 and not self._in_value  # {what is no string}

    def _begin_value(self, at: int) -> None:
        if self._depth == 1 and self._in_value and self._value_at is None:
            self._value_at = at
            if self._key in self._keys and self.start is None:
                self.start = at

    def _end_value(self, end: int) -> None:
        if self._key in self._keys and self.start is not None and self.end is None:
            self.end = end

    def _string(self, quoted: str, at: int) -> None:
        """A whole string at the object's own level: a key, or a member's value."""
        try:
            said = json.loads(quoted)
        except ValueError:
            self.broken = True
            return
        if not self._in_value:
            self._key = said
        elif self._key == "name":
            self.name = said
        else:
            self._end_value(at + 1)

    def arguments(self, since: int) -> str:
        """What there is of the arguments' text beyond its first ``since`` characters."""
        if self.start is None:
            return ""
        end = len(self.text) if self.end is None else self.end
        return self.text[self.start + since : end]


class ToolText:
    """One answer's text taken apart. ``names``: of the functions that there are; calls of others are content."""

    def __init__(self, dialect: Dialect, names: Collection[str]) -> None:
        self._dialect, self._names = dialect, frozenset(names)
        self._held = ""
        """Text of which it is not known yet what it is."""
        self._inside = False
        """Whether calls have been opened."""
        self._opened = ""
        """What opened the present call and would be content if it is none."""
        self._object: _Object | None = None
        self._told = 0
        """Characters of the present call's arguments that have been told."""
        self._is_told = False
        """Whether the present call's name has been told."""
        self._content_so_far = ""
        self._content_told = False
        """Of a dialect in which a call is all there is: the answer is none."""
        self.n_calls = 0

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """Content and pieces of calls that this text completes."""
        self._held += text
        content, parts = "", list[CallPart]()
        while self._step(parts):
            content += self._take_content()
        return content + self._take_content(), parts

    def flush(self) -> tuple[str, list[CallPart]]:
        """The answer has ended: what was held is what it is. A call that was told and not ended stays cut."""
        content, parts = self.push("")
        if self._object is not None:
            rest = "" if self._is_told else self._opened + self._object.text
        else:
            rest = self._opened + self._held
        if self.n_calls and not rest.strip(_BLANKS):
            rest = ""
        self._held, self._opened, self._object = "", "", None
        return content + rest, parts

    def _take_content(self) -> str:
        said, self._content_so_far = self._content_so_far, ""
        return said

    def _step(self, parts: list[CallPart]) -> bool:
        """One move; whether another may follow."""
        if self._object is not None:
            return self._in_object(self._object, parts)
        if self._inside:
            return self._between()
        if not self._dialect.opening:
            return self._at_start()
        return self._outside()

    def _outside(self) -> bool:
        opening = self._dialect.opening
        at = self._held.find(opening)
        if at >= 0:
            self._content_so_far += self._held[:at].rstrip(_BLANKS)
            self._held, self._inside, self._opened = self._held[at + len(opening) :], True, opening
            return True
        keep = max((n for n in range(1, len(opening)) if self._held.endswith(opening[:n])), default=0)
        # Blanks are told with what follows them: before a call, and after the last, they are not told at all.
        cut = len(self._held[: len(self._held) - keep].rstrip(_BLANKS))
        self._content_so_far += self._held[:cut]
        self._held = self._held[cut:]
        return False

    def _at_start(self) -> bool:
        """Of a dialect in which a call is all there is: the first character tells."""
        between = _BLANKS + ";" if self.n_calls else _BLANKS
        held = self._held.lstrip(between)
        for mark in CALL_MARKS:
            if held.startswith(mark):
                held = held[len(mark) :].lstrip(_BLANKS)
            elif held and mark.startswith(held):
                return False
        if not held:
            return False
        if held[0] == "{" and not self._content_told:
            self._opened, self._held = self._held[: len(self._held) - len(held)], held
            self._object, self._told, self._is_told = _Object(self._dialect.arguments_key), 0, False
            return True
        self._content_told = True
        self._content_so_far += self._held
        self._held = ""
        return False

    def _between(self) -> bool:
        """After an opening, or after a call inside of one."""
        held = self._held.lstrip(_BLANKS + ",[" if self._dialect.closing == "]" else _BLANKS)
        closing = self._dialect.closing
        if not closing:
            self._held, self._inside = held, False
            return bool(held)
        if held.startswith(closing):
            self._held, self._inside = held[len(closing) :], False
            return True
        if not held or closing.startswith(held):
            return False
        self._opened += self._held[: len(self._held) - len(held)]
        self._held = held
        self._object, self._told, self._is_told = _Object(self._dialect.arguments_key), 0, False
        return True

    def _in_object(self, call: _Object, parts: list[CallPart]) -> bool:
        n = call.take(self._held)
        self._held = self._held[n:]
        if not call.broken and call.name is not None and call.name not in self._names and not self._is_told:
            call.broken = True
        if call.broken and not self._is_told:
            self._content_so_far += self._opened + call.text
            self._object, self._inside, self._opened = None, False, ""
            self._content_told = True
            return True
        if not self._is_told and call.name is not None and (call.start is not None or call.done):
            parts.append(CallPart(self.n_calls, call.name))
            self.n_calls += 1
            self._is_told = True
        if self._is_told and (new := call.arguments(self._told)):
            self._told += len(new)
            parts.append(CallPart(self.n_calls - 1, None, new))
        if not call.done and not call.broken:
            return False
        if not self._told:
            parts.append(CallPart(self.n_calls - 1, None, "{}"))
        self._object, self._inside, self._opened = None, True, ""
        return True
