"""Batches: a file of requests, a line each, answered into another.

    line     {"custom_id", "method": "POST", "url", "body"}                    OpenAI's
    answer   {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Answers are appended whole, in the order in which they come. A file of answers that is there already is gone on with:
whose custom_id stands in it is not asked again, and a last line that was cut is dropped.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tenon.base.errors import RequestError, ResourceError

URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_LINES: Final = 50_000
MAX_ID_CHARS: Final = 512
LONGEST_WAIT_S: Final = 30.0
"""Between two tries of a line that the server has no room for."""
_FIELDS: Final = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Line:
    """One request."""

    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What came of a line: ``body`` is JSON, whatever the status; ``retry_after_s`` where it says when to try again."""

    status: int
    request_id: str
    body: Any
    retry_after_s: float | None = None


Ask = Callable[[Line], Awaitable[Reply]]


def read_lines(data: bytes, *, endpoint: str | None = None) -> list[Line]:
    """The requests in a file. Raises ``RequestError`` naming the line and the field. ``endpoint``: the only url."""
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(data.splitlines(), 1):
        if not raw.strip():
            continue
        line = _line(raw, number, endpoint)
        if line.custom_id in seen:
            said = f"line {number}: custom_id {line.custom_id!r:.80} stands in line {seen[line.custom_id]} already"
            raise RequestError(said, param="custom_id", code="duplicate_custom_id")
        seen[line.custom_id] = number
        lines.append(line)
        if len(lines) > MAX_LINES:
            raise RequestError(f"a batch has at most {MAX_LINES} lines", param="input_file_id", code="too_many_lines")
    if not lines:
        raise RequestError("the file has no requests", param="input_file_id", code="empty_file")
    return lines


def _line(raw: bytes, number: int, endpoint: str | None) -> Line:
    def wrong(param: str, said: str) -> RequestError:
        return RequestError(f"line {number}: {said}", param=param, code="invalid_line")

    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise wrong("", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise wrong("", "must be a JSON object")
    unknown = sorted(value.keys() - _FIELDS)
    if unknown:
        raise wrong(unknown[0], f"unknown field {unknown[0]!r:.80}")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise wrong("custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters, got {custom_id!r:.80}")
    if value.get("method", "POST") != "POST":
        raise wrong("method", f"method must be 'POST', got {value['method']!r:.40}")
    allowed = URLS if endpoint is None else (endpoint,)
    if not isinstance(url, str) or url not in allowed:
        raise wrong("url", f"url must be {' or '.join(allowed)}, got {url!r:.80}")
    if not isinstance(body, dict):
        raise wrong("body", f"body must be an object, got {type(body).__name__}")
    if body.get("stream"):
        raise wrong("body.stream", "stream cannot be had in a batch")
    return Line(custom_id, url, json.dumps(body).encode())


class Answers:
    """A file of answers that grows. Use it as a context manager: it is flushed to disk at the end."""

    def __init__(self, path: Path) -> None:
        """Raises ``ResourceError`` where the file cannot be had, or holds something else than answers."""
        self.path = path
        self.done: dict[str, bool] = {}
        """Of each custom_id that is answered, whether well."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error
        self._file.seek(0)
        kept = 0
        for raw in self._file.read().splitlines(keepends=True):
            if not raw.endswith(b"\n"):
                break
            self._take(raw)
            kept += len(raw)
        self._file.truncate(kept)

    def _take(self, raw: bytes) -> None:
        try:
            value = json.loads(raw)
            custom_id = value["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            self._file.close()
            said = f"{self.path} has lines that are no answers of a batch; name another file"
            raise ResourceError(said, subject=str(self.path)) from error
        self.done[custom_id] = _is_well(value)

    def add(self, line: Line, reply: Reply) -> None:
        """Append what came of a line. Raises ``ResourceError`` when the disk refuses."""
        value = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": line.custom_id,
            "response": {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body},
            "error": None,
        }
        try:
            self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"cannot write {self.path}: {error.strerror or error}", subject=str(self.path)
            ) from error
        self.done[line.custom_id] = _is_well(value)

    @property
    def n_failed(self) -> int:
        return sum(not well for well in self.done.values())

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _is_well(value: dict[str, Any]) -> bool:
    response = value.get("response")
    return isinstance(response, dict) and response.get("status_code") == 200


async def answer_all(
    lines: Iterable[Line],
    ask: Ask,
    answers: Answers,
    *,
    at_once: int,
    may_start: Callable[[], bool] = lambda: True,
    on_answer: Callable[[Line, Reply], None] = lambda line, reply: None,
) -> None:
    """Ask for every line that has no answer yet, ``at_once`` at a time, and new ones only while ``may_start``.

    A line that the server has no room for, or cannot serve now (429, 503), is asked again when it says.
    """
    left = iter([line for line in lines if line.custom_id not in answers.done])

    async def work() -> None:
        for line in left:
            wait_s = 0.1
            while True:
                while not may_start():
                    await asyncio.sleep(0.05)
                reply = await ask(line)
                if reply.status not in (429, 503):
                    break
                wait_s = min(LONGEST_WAIT_S, 2 * wait_s)
                await asyncio.sleep(reply.retry_after_s if reply.retry_after_s is not None else wait_s)
            answers.add(line, reply)
            on_answer(line, reply)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
