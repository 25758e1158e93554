"""What clients ask to be promised: seconds to the first token and of each after it, by themselves or by a class.

A body has ``slo``, and ``service_tier`` or ``priority``; a request has headers; a server has classes, and one without a
name for requests that name none; a key has a class and floors. Each bound is the first there is of

    body > header > class > the key's class > the server's default

and the class that of the body, of ``x-slo-class``, of ``service_tier`` or ``priority``, of the key, or none. Where a
key has a floor, nobody may ask for less by himself, and what a class has below it is raised to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from tenon.base.errors import ConfigError, RequestError
from tenon.engine.promises import Slo
from tenon.server.keys import Key

TTFT_HEADER: Final = "x-slo-ttft-ms"
TPOT_HEADER: Final = "x-slo-tpot-ms"
CLASS_HEADER: Final = "x-slo-class"
URGENT, PATIENT = "interactive", "batch"
"""Classes that ``service_tier`` and ``priority`` stand for."""
TIERS: Final = {"priority": URGENT, "flex": PATIENT}
PLAIN_TIERS: Final = (None, "auto", "default")
"""Tiers that ask for nothing."""
MAX_NAME_CHARS: Final = 64
_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_NAME_CHARS}}}")
_WRITTEN: Final = "[CLASS:]ttft=0.5,tpot=50ms,weight=2 with seconds and a weight above 0"


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body's ``slo``. ``tpot_x``: as many times what a token takes in a sequence that decodes alone."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    tpot_x: float | None = None
    name: str | None = msgspec.field(default=None, name="class")
    strict: bool = False


NO_WISH: Final = Wish()


class Urgent(Protocol):
    """What of a body says how soon it wants its answer."""

    @property
    def slo(self) -> Wish | None: ...

    @property
    def service_tier(self) -> str | None: ...

    @property
    def priority(self) -> int | None: ...


@dataclass(frozen=True)
class Heard:
    """What a request's headers say."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    name: str | None = None


NOTHING_HEARD: Final = Heard()


def heard(headers: Mapping[str, str]) -> Heard:
    """Raises ``RequestError`` naming the header."""
    return Heard(_number(headers, TTFT_HEADER), _number(headers, TPOT_HEADER), headers.get(CLASS_HEADER))


def _number(headers: Mapping[str, str], name: str) -> float | None:
    said = headers.get(name)
    try:
        return None if said is None else _positive(float(said), name)
    except ValueError:
        raise _wrong(name, "a number above 0", said) from None


@dataclass(frozen=True)
class Promise:
    """What an ``Add`` is told. ``slo`` is None where nothing is asked for."""

    name: str = ""
    slo: Slo | None = None


NO_PROMISE: Final = Promise()


@dataclass(frozen=True)
class Objectives:
    """A server's classes by name; the one without a name is the default of requests that name none."""

    classes: Mapping[str, Slo] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for name in self.classes if name]

    def check_keys(self, keys: Sequence[Key]) -> None:
        """Raises ``ConfigError`` for a key whose class there is not."""
        for key in keys:
            if key.slo_class is not None and key.slo_class not in self.names:
                said = f"key {key.name!r}: slo_class must be a class that --slo defines ({self._known}), "
                raise ConfigError(said + f"got {key.slo_class!r}", subject="slo_class")

    def of(self, body: Urgent, heard: Heard, key: Key | None, token_s: float) -> Promise:
        """What a request is promised. ``token_s``: of a sequence that decodes alone. Raises ``RequestError`` naming the
        field or the header."""
        wish = body.slo or NO_WISH
        name = self._name(body, wish, heard, key)
        keys_class = None if key is None else key.slo_class
        inherited = [self.classes[one] for one in (name, keys_class, "") if one is not None and one in self.classes]
        own_ms, where = _first(_bound(wish.ttft_ms, "slo.ttft_ms"), (heard.ttft_ms, TTFT_HEADER))
        least_ms = None if key is None else key.least_ttft_ms
        ttft_s = _settled(own_ms, where, least_ms, [slo.ttft_s for slo in inherited])
        own_ms, where = _first(_own_tpot(wish, token_s), (heard.tpot_ms, TPOT_HEADER))
        least_ms = None if key is None else key.least_tpot_ms
        tpot_s = _settled(own_ms, where, least_ms, [slo.tpot_s for slo in inherited])
        weight = self.classes[name].weight if name in self.classes else 1.0
        slo = Slo(ttft_s, tpot_s, weight, wish.strict)
        if slo.strict and not slo.promises:
            said = "slo.strict needs something to be strict about: slo.ttft_ms, slo.tpot_ms or a class that has them"
            raise RequestError(said, param="slo.strict", code="invalid_value")
        return Promise(name, slo if slo != Slo() else None)

    def _name(self, body: Urgent, wish: Wish, heard: Heard, key: Key | None) -> str:
        tiered = self._tier(body.service_tier)
        urgent = self._priority(body.priority)
        for name, where in ((wish.name, "slo.class"), (heard.name, CLASS_HEADER)):
            if name is not None:
                if name not in self.names:
                    raise _wrong(where, f"a class of this server ({self._known})", name)
                return name
        return tiered or urgent or (key.slo_class if key is not None else None) or ""

    def _tier(self, tier: str | None) -> str | None:
        if tier in PLAIN_TIERS:
            return None
        return self._stood_for("service_tier", tier, TIERS.get(tier or ""))

    def _priority(self, priority: int | None) -> str | None:
        if not priority:
            return None
        return self._stood_for("priority", priority, URGENT if priority < 0 else PATIENT)

    def _stood_for(self, where: str, given: object, name: str | None) -> str:
        if name is not None and name in self.names:
            return name
        means = f" stands for the class {name!r}, which" if name is not None else ""
        said = f"{where} {given!r}{means} is not defined here; this server's classes: {self._known}"
        raise RequestError(said, param=where, code="unsupported")

    @property
    def _known(self) -> str:
        return ", ".join(self.names) or "none"


NO_OBJECTIVES: Final = Objectives()


def class_from(text: str) -> tuple[str, Slo]:
    """``[CLASS:]ttft=0.5,tpot=50ms,weight=2`` as a class's name and bounds. Raises ``ConfigError`` naming the part."""
    name, colon, bounds = text.rpartition(":")
    if colon and not _NAME.fullmatch(name):
        right = f"a name has up to {MAX_NAME_CHARS} letters, digits, ., _ and -"
        raise ConfigError(f"the SLO {text!r} names the class {name!r}; {right}", subject="slo")
    found: dict[str, float] = {}
    for part in bounds.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        is_time = key != "weight"
        unit, number = (1e-3, value[:-2]) if is_time and value.endswith("ms") else (1.0, value)
        try:
            amount = float(number.removesuffix("s") if is_time else number) * unit
        except ValueError:
            amount = math.nan
        field_name = f"{key}_s" if is_time else key
        if key not in ("ttft", "tpot", "weight") or not (math.isfinite(amount) and amount > 0):
            raise ConfigError(f"an SLO is written {_WRITTEN}, got {part!r} in {text!r}", subject="slo")
        if field_name in found:
            raise ConfigError(f"the SLO {text!r} has {key} twice; leave one out", subject="slo")
        found[field_name] = amount
    return name, Slo(found.get("ttft_s"), found.get("tpot_s"), found.get("weight", 1.0))


def classes_from(texts: Sequence[str]) -> dict[str, Slo]:
    """Classes as :func:`class_from` reads them. Raises ``ConfigError`` for one that is named twice."""
    classes: dict[str, Slo] = {}
    for name, slo in map(class_from, texts):
        if name in classes:
            which = f"the class {name!r}" if name else "requests that name no class"
            raise ConfigError(f"two SLOs are given for {which}; put their bounds into one", subject="slo")
        classes[name] = slo
    return classes


Given = tuple[float | None, str]
"""Milliseconds that a client asks for itself, and where."""


def _first(*given: Given) -> Given:
    return next((one for one in given if one[0] is not None), (None, ""))


def _bound(value: float | None, where: str) -> Given:
    return (None if value is None else _positive(value, where)), where


def _own_tpot(wish: Wish, token_s: float) -> Given:
    if wish.tpot_x is None:
        return _bound(wish.tpot_ms, "slo.tpot_ms")
    if wish.tpot_ms is not None:
        said = "slo.tpot_ms and slo.tpot_x cannot be had together: give one of them"
        raise RequestError(said, param="slo.tpot_x", code="invalid_value")
    times = _positive(wish.tpot_x, "slo.tpot_x")
    return _bound(times * token_s * 1e3, "slo.tpot_x")


def _settled(
    own_ms: float | None, where: str, least_ms: float | None, inherited: Sequence[float | None]
) -> float | None:
    """The bound in seconds."""
    if own_ms is not None:
        if least_ms is not None and own_ms < least_ms:
            said = f"{where} must be at least {least_ms:g} ms for this key, got {own_ms:g} ms"
            raise RequestError(said, param=where, code="invalid_value")
        return own_ms / 1e3
    bound_s = next((one for one in inherited if one is not None), None)
    return bound_s if bound_s is None or least_ms is None else max(bound_s, least_ms / 1e3)


def _positive(value: float, where: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise _wrong(where, "a number above 0", value)
    return value


def _wrong(where: str, right: str, got: object) -> RequestError:
    return RequestError(f"{where} must be {right}, got {got!r:.80}", param=where, code="invalid_value")
