"""What the form of an output must be, as a caller says it: a JSON schema, any JSON object, a pattern, one of several
texts, a grammar. Checked when made: size and depth first, so that no later stage sees what it could drown in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tenon.base.errors import RequestError
from tenon.engine.schema import cannot_keep, with_patterns

KINDS: Final = ("json_schema", "json_object", "regex", "ebnf", "tags")
MAX_BYTES: Final = 64 * 2**10
MAX_DEPTH: Final = 64
MAX_CHOICES: Final = 1024


@dataclass(frozen=True)
class Structure:
    """``source``: the schema as JSON, the pattern, the grammar in GBNF's notation with a rule ``root``, or xgrammar's
    structural tags as JSON. Raises ``RequestError`` naming ``param``."""

    kind: str
    source: str = ""
    param: str = "response_format"
    exact: bool = True
    """Whether a grammar that is known to take more than was asked for is refused."""

    def __post_init__(self) -> None:
        n_bytes = len(self.source.encode("utf-8", "surrogatepass"))
        if n_bytes > MAX_BYTES:
            raise self._wrong(f"of {n_bytes} bytes exceeds the limit of {MAX_BYTES}")
        depth = _bracket_depth(self.source)
        if depth > MAX_DEPTH:
            raise self._wrong(f"is nested {depth} deep; the limit is {MAX_DEPTH}")
        if self.kind == "regex" and not self.source:
            raise self._wrong("is empty")

    def _wrong(self, said: str) -> RequestError:
        name = {"json_schema": "schema", "regex": "pattern", "ebnf": "grammar"}.get(self.kind, self.kind)
        return RequestError(f"{self.param}: the {name} {said}", param=self.param, code="invalid_grammar")


def json_schema(schema: Any, param: str, *, strict: bool = True) -> Structure:
    """Raises ``RequestError`` for what is no schema and, if ``strict``, for one that says what could not be kept."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestError(f"{param} is not JSON: {error}", param=param, code="invalid_grammar") from error
    if not isinstance(schema, dict | bool):
        said = f"{param} must be a JSON schema, which is an object, got {type(schema).__name__}"
        raise RequestError(said, param=param, code="invalid_grammar")
    try:
        Structure("json_schema", json.dumps(schema, ensure_ascii=False), param)  # size and depth, before anything else
    except RecursionError as error:
        said = f"{param}: the schema is nested too deep; the limit is {MAX_DEPTH}"
        raise RequestError(said, param=param, code="invalid_grammar") from error
    if strict and (why := cannot_keep(schema)) is not None:
        raise RequestError(f"{param}: {why}", param=param, code="unsupported_schema")
    return Structure("json_schema", json.dumps(with_patterns(schema), ensure_ascii=False), param, exact=strict)


def choice(options: Sequence[Any], param: str) -> Structure:
    """One of these texts. Raises ``RequestError``."""
    if not options or len(options) > MAX_CHOICES or not all(isinstance(one, str) and one for one in options):
        said = f"{param} must be 1 to {MAX_CHOICES} texts that are not empty"
        raise RequestError(said, param=param, code="invalid_grammar")
    return Structure("ebnf", "root ::= " + " | ".join(json.dumps(one) for one in options), param)


def _bracket_depth(text: str) -> int:
    """How deep brackets are nested, whatever they mean."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest
