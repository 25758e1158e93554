"""Lines of OpenAI's batch files: what is asked, what was answered, and the journal that answers are appended to.

A journal is also the output file of ``tenon batch``. It only grows, by whole lines. A process that is killed may leave
a torn last line: whoever opens it next cuts that off, and asks again what has no line.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from tenon.base.errors import ConfigError, RequestError, ResourceError

URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
FIELDS: Final = ("custom_id", "method", "url", "body")
MAX_ID_CHARS: Final = 512
_SHOWN_CHARS: Final = 60


class BadLine(RequestError):
    """A line that asks for nothing that could be answered: its number, field and value, and what would be right."""

    def __init__(self, line: int, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(f"line {line}: {message}", param=param, code=code)
        self.line = line


@dataclass(frozen=True)
class Line:
    """One request of a batch. ``body`` is JSON, an object; ``model`` is what it names, if it does; ``n_sequences``:
    about how many it makes the engine compute."""

    number: int
    custom_id: str
    url: str
    body: bytes
    model: str | None
    n_sequences: int = 1


class _Wish(msgspec.Struct, frozen=True):
    """What a body says that matters before it is sent. Whatever else is wrong with it, its own answer tells."""

    model: Any = None
    stream: Any = None
    n: Any = None
    best_of: Any = None
    prompt: Any = None
    input: Any = None

    def n_sequences(self, url: str) -> int:
        given = {"/v1/completions": self.prompt, "/v1/embeddings": self.input}.get(url)
        prompts = given if isinstance(given, list) else []
        n_prompts = len(prompts) if prompts and not isinstance(prompts[0], int) else 1
        return n_prompts * max([1, *(it for it in (self.n, self.best_of) if isinstance(it, int))])


def parse_line(number: int, text: bytes, endpoint: str | None = None) -> Line:
    """Raises ``BadLine``. ``endpoint``: the one URL that is right here; any of ``URLS`` without."""
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(raw) for name, raw in fields.items() if name != "body"}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = f"it must be a JSON object with {', '.join(FIELDS)}, got {_shown(text)} ({error})"
        raise BadLine(number, said, code="invalid_json_line") from error
    for name in fields:
        if name not in FIELDS:
            raise BadLine(number, f"the field {name!r} is not known; known are {', '.join(FIELDS)}", param=name)
    for name in FIELDS:
        if name not in fields:
            raise BadLine(number, f"the field {name!r} is missing", param=name, code="missing_required_parameter")
    custom_id, url, method = values["custom_id"], values["url"], values["method"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        said = f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters, got {_shown(bytes(fields['custom_id']))}"
        raise BadLine(number, said, param="custom_id")
    if method != "POST":
        raise BadLine(number, f"method must be 'POST', got {_shown(bytes(fields['method']))}", param="method")
    right = URLS if endpoint is None else (endpoint,)
    if url not in right:
        said = f"url must be {' or '.join(right)}, got {_shown(bytes(fields['url']))}"
        raise BadLine(number, said, param="url", code="invalid_url")
    body = bytes(fields["body"])
    try:
        wish = msgspec.json.decode(body, type=_Wish)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadLine(number, f"body must be a JSON object, got {_shown(body)} ({error})", param="body") from error
    if wish.stream not in (None, False):
        raise BadLine(number, f"body.stream must be false in a batch, got {wish.stream!r}", param="body.stream")
    model = wish.model if isinstance(wish.model, str) else None
    return Line(number, custom_id, url, body, model, wish.n_sequences(url))


def _shown(text: bytes) -> str:
    said = text[: _SHOWN_CHARS + 1].decode(errors="replace").strip()
    return said if len(said) <= _SHOWN_CHARS else said[:_SHOWN_CHARS] + "..."


def read_lines(path: Path, endpoint: str | None = None) -> Iterator[Line | BadLine]:
    """The requests of a file, one after another, and what is wrong in their place. Empty lines are passed over.

    Raises ``ConfigError`` where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line: Line | BadLine = parse_line(number, text, endpoint)
                except BadLine as bad:
                    line = bad
                yield line
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error


def sound_lines(path: Path, endpoint: str | None = None) -> Iterator[Line]:
    """The same of a file that has been checked. Raises ``BadLine`` where it is not what was checked."""
    for line in read_lines(path, endpoint):
        if isinstance(line, BadLine):
            raise line
        yield line


@dataclass
class Check:
    """What a whole file asks for: its ids with their lines, the models that it names, and what is wrong with it."""

    ids: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    """The first line that names each."""
    bad: list[BadLine] = field(default_factory=list)


def check_file(
    path: Path, endpoint: str | None = None, *, max_lines: int | None = None, max_bad: int | None = None
) -> Check:
    """Read it all. Ends early after ``max_bad`` lines that are wrong."""
    check = Check()
    for line in read_lines(path, endpoint):
        if isinstance(line, BadLine):
            check.bad.append(line)
        elif line.custom_id in check.ids:
            said = f"custom_id {line.custom_id!r} is that of line {check.ids[line.custom_id]} too; each needs its own"
            check.bad.append(BadLine(line.number, said, param="custom_id", code="duplicate_custom_id"))
        elif max_lines is not None and len(check.ids) == max_lines:
            said = f"a batch may have {max_lines} requests, and here is one more"
            check.bad.append(BadLine(line.number, said, code="too_many_requests"))
            break
        else:
            check.ids[line.custom_id] = line.number
            if line.model is not None:
                check.models.setdefault(line.model, line.number)
        if max_bad is not None and len(check.bad) >= max_bad:
            break
    if not check.ids and not check.bad:
        check.bad.append(BadLine(1, "the file is empty; it must have one request a line", code="empty_file"))
    return check


class Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answered line. ``error``: why there is no ``response``."""

    id: str
    custom_id: str
    response: Response | None = None
    error: dict[str, str | None] | None = None

    @property
    def succeeded(self) -> bool:
        return self.response is not None and self.response.status_code == 200


def answered(custom_id: str, status: int, request_id: str, body: bytes) -> Output:
    return Output(new_id(), custom_id, Response(status, request_id, msgspec.Raw(body)))


def unanswered(custom_id: str, code: str, message: str) -> Output:
    return Output(new_id(), custom_id, error={"code": code, "message": message})


def new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Used(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


@dataclass
class Tally:
    """What has come of the lines so far."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, output: Output) -> None:
        if not output.succeeded or output.response is None:
            self.failed += 1
            return
        self.completed += 1
        try:
            usage = msgspec.json.decode(output.response.body, type=_Used).usage
        except msgspec.DecodeError:
            return  # another server's idea of usage
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens + usage.input_tokens
            self.output_tokens += usage.completion_tokens + usage.output_tokens


class Journal:
    """A file of answered lines, opened to go on with it. One process at a time. Use as a context manager."""

    def __init__(self, path: Path, *, mode: int = 0o644) -> None:
        """Cuts off a torn last line. Raises ``ResourceError`` where the file cannot be had, and ``ConfigError`` naming
        the line that is none of a batch's output."""
        self.path = path
        self.tally = Tally()
        self.done: dict[str, int] = {}
        """Ids that have a line, and which."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._n_bytes = self._read()
            os.ftruncate(self._fd, self._n_bytes)
            os.lseek(self._fd, self._n_bytes, os.SEEK_SET)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ResourceError(f"{path} is being written by another process", subject=str(path)) from error
        except OSError as error:
            os.close(self._fd)
            raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def append(self, output: Output) -> int:
        """One whole line, or nothing of it; its bytes. Raises ``ResourceError`` where the disk refuses."""
        line = msgspec.json.encode(output) + b"\n"
        rest = line
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, self._n_bytes)
            os.lseek(self._fd, self._n_bytes, os.SEEK_SET)
            raise ResourceError(
                f"cannot write {self.path}: {error.strerror or error}", subject=str(self.path)
            ) from error
        self._n_bytes += len(line)
        self._take(output, len(self.done) + 1)
        return len(line)

    def close(self) -> None:
        """Wait for the disk."""
        os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def _read(self) -> int:
        """Take what is there; the bytes up to and with the last newline."""
        n_bytes = 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._take(self._output(line, number), number)
                n_bytes += len(line)
        return n_bytes

    def _output(self, line: bytes, number: int) -> Output:
        try:
            output = msgspec.json.decode(line, type=Output)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            said = f"{self.path} line {number} is no line of a batch's output ({error}); it is left as it is"
            raise ConfigError(said, subject=str(self.path)) from error
        if output.custom_id in self.done:
            said = f"{self.path} line {number} answers custom_id {output.custom_id!r} again, after line"
            raise ConfigError(f"{said} {self.done[output.custom_id]}", subject=str(self.path))
        return output

    def _take(self, output: Output, number: int) -> None:
        self.done[output.custom_id] = number
        self.tally.add(output)
