"""How clients say how far tokens may be guessed ahead for a request: ``true``, ``false``, or an object of both.

It bounds what the engine does by itself, and never asks for more: answers are the same whichever, so that a server that
guesses nothing takes it too.
"""

from __future__ import annotations

import msgspec

from tenon.base.errors import RequestError


class Speculative(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``max_tokens``: the most that are guessed ahead at once; as many as the engine does where it is left out."""

    enabled: bool = True
    max_tokens: int | None = None


def wished(given: bool | Speculative | None) -> dict[str, bool | int]:
    """What ``SamplingParams`` is to be told. Raises ``RequestError`` naming the field."""
    if given is None:
        return {}
    if isinstance(given, bool):
        return {"speculative": given}
    most = given.max_tokens
    if most is not None and not 1 <= most < 2**31:
        where = "speculative.max_tokens"
        raise RequestError(f"{where} must be an integer of at least 1, got {most}", param=where, code="invalid_value")
    return {"speculative": given.enabled if most is None or not given.enabled else most}
