"""Who may use the server, and how much: keys, their tenants, their quotas.

A key file is TOML, a table for each key::

    [[key]]
    name = "alice"                    # in logs, never the key itself
    sha256 = "9f86d081884c7d65..."    # of the key; or  key = "..."
    tenant = "research"               # whose cached prompts it shares; by default its own
    watch = true                      # may read /metrics and /events, which tell of everybody; by default not
    requests_per_minute = 60          # by default without limit
    tokens_per_minute = 100000        # prompts and answers
    slo_class = "interactive"         # of requests that name none (tenon.server.slo)
    least_ttft_ms = 200               # the least that may be asked for
    least_tpot_ms = 20

A quota is a bucket that holds a minute's worth and fills evenly. A request takes all the tokens that it may use when it
is admitted; what it has not used by its end comes back.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tenon.base.clock import Clock
from tenon.base.errors import ConfigError
from tenon.server.failures import Refusal

_QUOTAS: Final = ("requests_per_minute", "tokens_per_minute")
_FLOORS: Final = ("least_ttft_ms", "least_tpot_ms")
_FIELDS: Final = frozenset({"name", "key", "sha256", "tenant", "watch", "slo_class", *_QUOTAS, *_FLOORS})
_LEAST_KEY_CHARS: Final = 16
_log = logging.getLogger("tenon.server")


@dataclass(frozen=True)
class Key:
    """One key's rights. ``None``: without limit."""

    name: str
    sha256: bytes
    tenant: str
    watch: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    slo_class: str | None = None
    least_ttft_ms: float | None = None
    least_tpot_ms: float | None = None


class Bucket:
    """At most ``per_minute`` at once, and so many a minute in the long run."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._at_s = float(per_minute), clock.now_s()

    def take(self, amount: float) -> float:
        """0 if there was enough, and it is taken; otherwise the seconds until there will be."""
        now_s = self._clock.now_s()
        self._level = min(self.per_minute, self._level + (now_s - self._at_s) * self.per_minute / 60)
        self._at_s = now_s
        if amount > self._level:
            return (amount - self._level) * 60 / self.per_minute
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        self._level = min(self.per_minute, self._level + amount)


class Caller:
    """Whoever sends a request: a key's owner, or anybody where there are no keys."""

    def __init__(self, key: Key | None, clock: Clock) -> None:
        self.key = key
        self._requests = self._tokens = None
        if key is not None and key.requests_per_minute is not None:
            self._requests = Bucket(key.requests_per_minute, clock)
        if key is not None and key.tokens_per_minute is not None:
            self._tokens = Bucket(key.tokens_per_minute, clock)

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.tenant

    def require_watch(self) -> None:
        """Raises ``Refusal`` (403) where the key may not see what others do."""
        if self.key is not None and not self.key.watch:
            raise Refusal(
                "this key may not watch the server: its entry lacks 'watch = true'", status=403, code="not_allowed"
            )

    def take_request(self) -> None:
        """Raises ``Refusal`` (429) saying when to try again."""
        wait_s = 0.0 if self._requests is None else self._requests.take(1)
        if self._requests is not None and wait_s > 0:
            said = f"this key may send {self._requests.per_minute} requests a minute"
            raise Refusal(said, status=429, code="rate_limit_exceeded", retry_after_s=wait_s)

    def take_tokens(self, n: int) -> None:
        """Raises ``Refusal``: 429 saying when to try again, 400 where waiting would not help."""
        if self._tokens is None:
            return
        most = self._tokens.per_minute
        if n > most:
            said = f"this key may use {most} tokens a minute, and the request may use {n}: lower max_tokens"
            raise Refusal(said, status=400, code="too_much_work", param="max_tokens")
        wait_s = self._tokens.take(n)
        if wait_s > 0:
            said = f"this key may use {most} tokens a minute, and the request may use {n}"
            raise Refusal(said, status=429, code="rate_limit_exceeded", retry_after_s=wait_s)

    def give_tokens_back(self, n: int) -> None:
        if self._tokens is not None:
            self._tokens.give_back(n)


@dataclass
class KeyRing:
    """The keys of a file. Raises ``ConfigError`` when made of one that is wrong."""

    path: Path
    clock: Clock
    _callers: dict[str, Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reload()

    @property
    def names(self) -> list[str]:
        return list(self._callers)

    @property
    def keys(self) -> list[Key]:
        return [caller.key for caller in self._callers.values() if caller.key is not None]

    def reload(self) -> None:
        """Read the file again. Raises ``ConfigError``; then the old keys stay."""
        self.use(read_keys(self.path))

    def use(self, found: list[Key]) -> dict[str, list[str]]:
        """These keys from now on; returns the names of those that came, went or changed. Keys that have not changed
        keep what is in their buckets."""
        old = self._callers
        self._callers = {
            key.name: old[key.name] if key.name in old and old[key.name].key == key else Caller(key, self.clock)
            for key in found
        }
        _log.info("%d keys read from %s", len(found), self.path)
        new = self._callers
        return {
            "added": [name for name in new if name not in old],
            "removed": [name for name in old if name not in new],
            "changed": [name for name in new if name in old and new[name] is not old[name]],
        }

    def named(self, name: str) -> Caller | None:
        """The owner of the key that has this name now."""
        return self._callers.get(name)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose request it is, by ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``. Raises ``Refusal`` (401)."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.casefold() != "bearer" or not given:
            given = headers.get("x-api-key", "")
        if not given:
            said = "this server wants a key: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
            raise Refusal(said, status=401, code="missing_api_key")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = None
        for caller in self._callers.values():  # all of them: how long it takes tells nothing
            if caller.key is not None and hmac.compare_digest(caller.key.sha256, digest):
                found = caller
        if found is None:
            raise Refusal("this key is not known here", status=401, code="invalid_api_key")
        return found


def read_keys(path: Path) -> list[Key]:
    """Raises ``ConfigError`` naming the file, the entry and what would be right."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}", subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"key file {path} is not TOML: {error}", subject=str(path)) from error
    entries = raw.get("key")
    if raw.keys() - {"key"} or not isinstance(entries, list) or not entries:
        raise ConfigError(f"key file {path} must hold [[key]] tables and nothing else", subject=str(path))
    found = [_key(entry, f"{path}: key {i + 1}") for i, entry in enumerate(entries)]
    for what, values in (("name", [key.name for key in found]), ("key", [key.sha256 for key in found])):
        if len(set(values)) < len(found):
            raise ConfigError(f"key file {path}: two entries have the same {what}", subject=what)
    return found


def _key(entry: Any, where: str) -> Key:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a table", subject="key")
    if unknown := sorted(entry.keys() - _FIELDS):
        raise ConfigError(f"{where} has {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}", subject=unknown[0])
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where} needs a name, got {name!r}", subject="name")
    tenant = entry.get("tenant", f"key:{name}")
    if not isinstance(tenant, str) or not tenant:
        raise ConfigError(f"{where}: tenant must be a word, got {tenant!r}", subject="tenant")
    watch = entry.get("watch", False)
    if not isinstance(watch, bool):
        raise ConfigError(f"{where}: watch must be true or false, got {watch!r}", subject="watch")
    limits: dict[str, int] = {}
    for field_name in _QUOTAS:
        value = entry.get(field_name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{where}: {field_name} must be a whole number above 0, got {value!r}", subject=field_name
            )
        limits[field_name] = value
    slo_class = entry.get("slo_class")
    if slo_class is not None and (not isinstance(slo_class, str) or not slo_class):
        raise ConfigError(f"{where}: slo_class must be the name of a class, got {slo_class!r}", subject="slo_class")
    least_ttft_ms, least_tpot_ms = (_floor(entry.get(each), f"{where}: {each}", each) for each in _FLOORS)
    return Key(
        name, _digest(entry, where), tenant, watch, **limits, slo_class=slo_class, least_ttft_ms=least_ttft_ms,
        least_tpot_ms=least_tpot_ms,
    )  # fmt: skip


def _floor(value: Any, where: str, subject: str) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ConfigError(f"{where} must be a number above 0, got {value!r}", subject=subject)
    return float(value)


def _digest(entry: dict[str, Any], where: str) -> bytes:
    plain, hashed = entry.get("key"), entry.get("sha256")
    if (plain is None) == (hashed is None):
        raise ConfigError(f"{where} needs either key or sha256", subject="key")
    if plain is not None:
        if not isinstance(plain, str) or len(plain) < _LEAST_KEY_CHARS:
            raise ConfigError(f"{where}: a key must have at least {_LEAST_KEY_CHARS} characters", subject="key")
        return hashlib.sha256(plain.encode()).digest()
    try:
        digest = bytes.fromhex(str(hashed))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits", subject="sha256")
    return digest
