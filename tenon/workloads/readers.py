"""Public trace files as traces: Mooncake, Azure LLM inference 2023 and 2024, BurstGPT, ShareGPT and LMSYS
conversations; and what our own server has written of its requests.

Every reader checks the whole file before it returns anything, and refuses with one sentence that names file, line and
field. What a file does not say (a prompt's text, mostly) becomes content of its own: such prompts share nothing.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from tenon.base.errors import ConfigError
from tenon.workloads import trace as traces
from tenon.workloads.trace import Segment, Trace, TraceRequest

MOONCAKE_BLOCK = 512


class Place:
    """A line of a file, to say what is wrong with it."""

    def __init__(self, path: Path, line: int) -> None:
        self.path, self.line = path, line

    def wrong(self, field: str, value: object, right: str) -> NoReturn:
        shown = "missing" if value is None else f"{value!r}"
        raise ConfigError(f"{self.path} line {self.line}: {field} must be {right}, is {shown}", subject=field)

    def number(self, field: str, value: object) -> float:
        """A finite number of at least 0."""
        number = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                self.wrong(field, value, "a number")
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            self.wrong(field, value, "a number")
        if number < 0:
            self.wrong(field, value, "at least 0")
        return float(number)

    def count(self, field: str, value: object, low: int = 0) -> int:
        """A whole number of at least ``low``."""
        number = self.number(field, value)
        if number != int(number) or number < low:
            self.wrong(field, value, f"a whole number of at least {low}")
        return int(number)


def read_text(path: Path) -> str:
    """The file as UTF-8. Raises ``ConfigError``."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", subject=str(path)) from error


# --- Mooncake -------------------------------------------------------------------------------------------------------


def mooncake(path: Path) -> Trace:
    """JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one of each 512 tokens.

    A hash names a block with all that precedes it, so a hash that follows two different ones is refused.
    """
    tree = _HashTree()
    requests = []
    for line, text in enumerate(read_text(path).splitlines(), 1):
        if not text.strip():
            continue
        place = Place(path, line)
        row = json_object(text, place)
        n_input = place.count("input_length", row.get("input_length"), 1)
        hashes = row.get("hash_ids")
        if not isinstance(hashes, list):
            place.wrong("hash_ids", hashes, "a list of whole numbers")
        ids = [place.count(f"hash_ids[{i}]", one) for i, one in enumerate(hashes)]
        blocks = -(-n_input // MOONCAKE_BLOCK)
        if len(ids) != blocks:
            place.wrong("hash_ids", len(ids), f"{blocks} hashes of {MOONCAKE_BLOCK} tokens for {n_input} tokens")
        requests.append(
            TraceRequest(
                id=f"{line}",
                arrival_s=place.number("timestamp", row.get("timestamp")) / 1000,
                prompt=tree.prompt(ids, n_input, place),
                # A request that was answered by nothing took its prefill all the same: one token is the least to ask
                # for.
                n_output=max(1, place.count("output_length", row.get("output_length"))),
            )
        )
    return _made(path, requests, "mooncake")


class _HashTree:
    """Hashes as stretches of contents: a hash that is new after the end of a content prolongs it."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[int, int]] = {}  # hash -> (content, index in it)
        self._before: dict[int, int] = {}
        self._length: list[int] = []

    def prompt(self, ids: list[int], n_tokens: int, place: Place) -> tuple[Segment, ...]:
        stretches: list[tuple[int, int]] = []  # (content, blocks), each from the content's start
        previous = -1
        for i, one in enumerate(ids):
            if self._before.setdefault(one, previous) != previous:
                right = f"after {self._before[one]} as before: a hash stands for all that precedes it"
                place.wrong(f"hash_ids[{i}]", f"{one} after {previous}", right)
            if one not in self._at:
                tail = self._at.get(previous)
                if tail is not None and self._length[tail[0]] == tail[1] + 1:
                    self._at[one] = (tail[0], tail[1] + 1)
                    self._length[tail[0]] += 1
                else:
                    self._at[one] = (len(self._length), 0)
                    self._length.append(1)
            content, index = self._at[one]
            if stretches and stretches[-1][0] == content:
                stretches[-1] = (content, index + 1)
            else:
                stretches.append((content, index + 1))
            previous = one
        full = [Segment(content, n * MOONCAKE_BLOCK) for content, n in stretches]
        spare = len(ids) * MOONCAKE_BLOCK - n_tokens
        return (*full[:-1], Segment(full[-1].content, full[-1].n - spare))


# --- tables ---------------------------------------------------------------------------------------------------------


def azure(path: Path) -> Trace:
    """CSV of ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens`` (2023 and 2024). Time 0 is the first request's."""
    rows = []
    for place, row in _table(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        at_ns = _timestamp_ns(row["TIMESTAMP"], place)
        rows.append((at_ns, place, place.count("ContextTokens", row["ContextTokens"]), row["GeneratedTokens"]))
    start_ns = min((row[0] for row in rows), default=0)
    requests = [
        _alone(place, (at_ns - start_ns) / 1e9, n_input, place.count("GeneratedTokens", generated))
        for at_ns, place, n_input, generated in rows
    ]
    return _made(path, requests, "azure")


_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")


def _timestamp_ns(text: str, place: Place) -> int:
    """Nanoseconds since the epoch; the files have seven decimals, more than Python's own parser takes."""
    found = _STAMP.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError(text)
        zone = (found[3] or "+00:00").replace("Z", "+00:00")
        seconds = datetime.fromisoformat(found[1] + zone).astimezone(UTC).timestamp()
    except ValueError:
        place.wrong("TIMESTAMP", text, "a time as 2023-11-16 18:15:46.6805900")
    return int(seconds) * 10**9 + int((found[2] or "0").ljust(9, "0"))


def burstgpt(path: Path) -> Trace:
    """CSV of BurstGPT: ``Timestamp`` (seconds), ``Model``, ``Request tokens``, ``Response tokens``, ``Total tokens``,
    ``Log Type``; newer releases also have ``Session ID``. Failures (no response tokens) are left out, as is said in
    ``parameters``; the class is the log type."""
    columns = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
    requests, failed = [], 0
    for place, row in _table(path, columns):
        at_s = place.number("Timestamp", row["Timestamp"])
        n_input = place.count("Request tokens", row["Request tokens"])
        n_output = place.count("Response tokens", row["Response tokens"])
        total = place.count("Total tokens", row["Total tokens"])
        if total != n_input + n_output:
            place.wrong("Total tokens", total, f"the sum of request and response tokens, {n_input + n_output}")
        if n_output == 0:
            failed += 1
            continue
        one = _alone(place, at_s, n_input, n_output)
        session = (row.get("Session ID") or "").strip()
        requests.append(msgspec.structs.replace(one, session=session, slo_class=row["Log Type"], tenant=row["Model"]))
    return _made(path, requests, "burstgpt", failures_left_out=failed)


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Place, dict[str, str]]]:
    """Rows with their places. Raises ``ConfigError`` for missing columns and for rows of another length."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in columns if name not in header]
    if missing:
        what = f"has no column {', '.join(missing)}; it has {', '.join(header) or 'nothing'}"
        raise ConfigError(f"{path} line 1 {what}", subject=missing[0])
    for cells in reader:
        place = Place(path, reader.line_num)
        if not cells:
            continue
        if len(cells) != len(header):
            place.wrong("the row", ",".join(cells), f"{len(header)} fields as the header")
        yield place, dict(zip(header, cells, strict=True))


def _alone(place: Place, at_s: float, n_input: int, n_output: int) -> TraceRequest:
    """A request of which only lengths are known. Empty prompts and answers count as one token, the least there is."""
    return TraceRequest(str(place.line), at_s, (Segment(place.line, max(1, n_input)),), max(1, n_output))


# --- conversations --------------------------------------------------------------------------------------------------

# How a text's tokens are counted, where no tokenizer is given: about four characters of English a token.
CHARACTERS_PER_TOKEN = 4
Count = Callable[[str], int]


def by_characters(text: str) -> int:
    """Tokens of a text, roughly: a quarter of its characters, one at least."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))


def conversations(path: Path, count: Count = by_characters, *, apart_s: float = 1.0, think_s: float = 10.0) -> Trace:
    """ShareGPT (``conversations`` of ``from``, ``value``) or LMSYS (``conversation`` of ``role``, ``content``), as a
    JSON list or JSON lines. Lengths by ``count``; who passes another than characters says so in the trace's header.

    These files have no times: sessions start ``apart_s`` apart, and a turn is sent ``think_s`` after the answer before
    it has ended. Each answer is a request whose prompt is all that was said before; a conversation may begin with a
    system message, and what comes before the first question otherwise is left out.
    """
    requests: list[TraceRequest] = []
    content = 1
    for number, (place, row) in enumerate(_objects(path)):
        session, history, after, turn = f"{number}", list[Segment](), "", 0
        at_s = number * apart_s
        for i, (who, text) in enumerate(_messages(row, place)):
            n = max(1, count(text))
            if who == "assistant" and history:
                one = f"{session}.{turn}"
                gap_s = think_s if after else 0.0
                at_s += gap_s
                requests.append(
                    TraceRequest(
                        id=one, arrival_s=at_s, prompt=tuple(history), n_output=n, output=content, after=after,
                        gap_s=gap_s, session=session, turn=turn,
                    )
                )  # fmt: skip
                after, turn = one, turn + 1
            elif who == "assistant" or (who == "system" and i > 0):
                continue
            history.append(Segment(content, n))
            content += 1
    if not requests:
        raise ConfigError(f"{path}: no conversation has a question and its answer", subject=str(path))
    how = "characters / 4" if count is by_characters else "a tokenizer"
    return _made(path, requests, "conversations", tokens_counted_by=how, apart_s=apart_s, think_s=think_s)


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
          "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system"}  # fmt: skip


def _messages(row: dict[str, Any], place: Place) -> Iterator[tuple[str, str]]:
    name = "conversations" if "conversations" in row else "conversation"
    messages = row.get(name)
    if not isinstance(messages, list):
        place.wrong("conversations", messages, "a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            place.wrong(f"{name}[{i}]", message, "an object")
        who, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not isinstance(text, str):
            place.wrong(f"{name}[{i}]'s text (value or content)", text, "text")
        if not isinstance(who, str) or who not in _ROLES:
            place.wrong(f"{name}[{i}]'s speaker (from or role)", who, "one of " + ", ".join(_ROLES))
        yield _ROLES[who], text


def _objects(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects of a JSON list (each at the list's line 1, by number) or of JSON lines."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        for line, one in enumerate(text.splitlines(), 1):
            if one.strip():
                yield Place(path, line), json_object(one, Place(path, line))
        return
    try:
        rows = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}", subject=str(path)) from error
    for i, row in enumerate(rows):
        place = _Item(path, i)
        if not isinstance(row, dict):
            place.wrong("the item", row, "an object")
        yield place, row


class _Item(Place):
    """An item of a JSON list, where lines say little."""

    def wrong(self, field: str, value: object, right: str) -> NoReturn:
        shown = "missing" if value is None else f"{value!r}"
        raise ConfigError(f"{self.path} item {self.line}: {field} must be {right}, is {shown}", subject=field)


# --- what a server wrote ---------------------------------------------------------------------------------------------

CACHED = 1
"""The content of what requests found in the cache: whose it was is not written down."""
SERVED = ("stop", "length")


def server(path: Path) -> Trace:
    """``events.jsonl`` of ``tenon serve --record``: the requests that it answered whole, when they came, and what was
    promised to each class (of several promises the last). What they found in its cache begins with the same tokens
    here. Others (aborted, refused, failed) are counted in the header as ``dropped``.
    """
    lengths: dict[str, tuple[int, int]] = {}
    requests: list[TraceRequest] = []
    slos: dict[str, dict[str, float]] = {}
    came: list[float] = []
    n_dropped = 0
    for place, row in _objects(path):
        name = row.get("request_id")
        if row.get("kind") == "started":
            lengths[str(name)] = place.count("n_prompt", row.get("n_prompt"), 1), place.count("n", row.get("n"), 1)
        if row.get("kind") != "finished":
            continue
        if row.get("reason") not in SERVED or name not in lengths:
            n_dropped += 1
            continue
        n_prompt, n = lengths[name]
        end_s, e2e_s = place.number("at_s", row.get("at_s")), place.number("e2e_s", row.get("e2e_s"))
        cache, slo = row.get("cache") or {}, row.get("slo") or {}
        cached = min(place.count("cache.cached_tokens", cache.get("cached_tokens", 0)), n_prompt - 1)
        own = Segment(place.line + CACHED, n_prompt - cached)
        prompt = (Segment(CACHED, cached), own) if cached else (own,)
        kind = str(slo.get("class", ""))
        bounds = {f"{one}_s": slo[f"{one}_ms"] / 1e3 for one in ("ttft", "tpot") if slo.get(f"{one}_ms")}
        if bounds:
            slos[kind] = bounds
        n_output = max(1, place.count("n_output", row.get("n_output")) // n)
        came.append(end_s - e2e_s)
        for index in range(n):
            requests.append(TraceRequest(f"{name}#{index}", end_s - e2e_s, prompt, n_output, slo_class=kind))
    from_s = min(came, default=0.0)
    moved = [msgspec.structs.replace(one, arrival_s=round(one.arrival_s - from_s, 6)) for one in requests]
    return _made(path, moved, "a server's events", dropped=n_dropped, **({"slo": slos} if slos else {}))


def json_object(text: str, place: Place) -> dict[str, Any]:
    """One line's object."""
    try:
        row = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{place.path} line {place.line} is not JSON: {error}", subject=str(place.path)) from error
    if not isinstance(row, dict):
        place.wrong("the line", row, "an object")
    return row


def _made(path: Path, requests: list[TraceRequest], form: str, **said: Any) -> Trace:
    if not requests:
        raise ConfigError(f"{path} has no requests", subject=str(path))
    return Trace.make(path.stem, f"{path.name}, read as {form}", requests, **said)


# --- by name --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A reader by name."""

    read: Callable[[Path], Trace]
    help: str


FORMATS = {
    "tenon": Format(traces.load, "what `tenon workload make` writes"),
    "mooncake": Format(mooncake, "JSON lines with timestamp, input_length, output_length, hash_ids"),
    "azure": Format(azure, "CSV with TIMESTAMP, ContextTokens, GeneratedTokens"),
    "burstgpt": Format(burstgpt, "CSV with Timestamp, Model, Request tokens, Response tokens, ..."),
    "sharegpt": Format(conversations, "JSON or JSON lines with conversations"),
    "lmsys": Format(conversations, "JSON or JSON lines with conversation"),
    "server": Format(server, "events.jsonl, which `tenon serve --record DIR` writes"),
}


def read(path: Path, form: str = "auto") -> Trace:
    """Raises ``ConfigError`` for an unknown format, and what the reader raises."""
    if form == "auto":
        form = guess(path)
    if form not in FORMATS:
        raise ConfigError(f"there is no trace format {form!r}; there are {', '.join(FORMATS)}", subject="format")
    return FORMATS[form].read(path)


def guess(path: Path) -> str:
    """The format by what the file begins with. Raises ``ConfigError`` when that fits none."""
    text = read_text(path)
    first = text.lstrip()[:GUESS_CHARACTERS].partition("\n")[0]
    signs = {
        "tenon": '"kind":"trace"', "mooncake": '"hash_ids"', "azure": "ContextTokens", "burstgpt": "Response tokens",
        "sharegpt": '"conversations"', "lmsys": '"conversation"', "server": '"kind":"run"',
    }  # fmt: skip
    for form, sign in signs.items():
        if sign in first or (first.startswith("[") and sign in text[:GUESS_CHARACTERS]):
            return form
    raise ConfigError(
        f"{path} is of none of the formats {', '.join(FORMATS)}; name one with --format", subject=str(path)
    )


GUESS_CHARACTERS = 1_000_000
