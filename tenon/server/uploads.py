"""Uploads: a multipart form with one file, written to disk as it comes, never held."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tenon.base.errors import RequestError, TenonError
from tenon.server.files import FILE_NAME, Draft, FileRecord, Shelf
from tenon.server.limits import BodyTooLarge

FORM_BYTES: Final = 64 * 2**10
"""What a form may have beside its file."""
VALUE_BYTES: Final = 1024
MAX_PARTS: Final = 8
PURPOSE: Final = "batch"


@dataclass
class _Part:
    """A part of the form: its header as it comes, then its value, unless it is the file."""

    disposition: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """What the parser says, piece by piece. ``pending`` is of the file and not yet written."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.pending: list[bytes] = []
        self.ended = False
        self._n_parts = 0
        self._part = _Part()
        self._header = bytearray()

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._name,
                "on_header_value": self._value,
                "on_header_end": self._header.clear,
                "on_headers_finished": self._headed,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._ended,
            },
        )

    def _begin(self) -> None:
        self._part = _Part()
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise _wrong(f"a form with a file has at most {MAX_PARTS} parts, and this one has more")

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        if self._header.lower() == b"content-disposition":
            self._part.disposition += data[start:end]

    def _headed(self) -> None:
        _, options = parse_options_header(self._part.disposition.decode("latin-1"))
        self._part.name = _text(options.get(b"name", b""), "name")
        if b"filename" not in options:
            if self._part.name == "file":
                raise _wrong("file must be a file with a name, got a value", "file")
            return
        self._part.filename = _text(options[b"filename"], "file")
        if self._part.name != "file":
            raise _wrong(f"the file must be the field 'file', got {self._part.name[:64]!r}", "file")
        if self.filename is not None:
            raise _wrong("a form has one file, and this one has two", "file")
        if not FILE_NAME.fullmatch(self._part.filename):
            said = "a file's name has 1 to 128 letters, digits, and ._- and spaces inside"
            raise _wrong(f"{said}, got {self._part.filename[:64]!r}", "file")
        self.filename = self._part.filename

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is not None:
            self.pending.append(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > VALUE_BYTES:
            raise _wrong(f"{self._part.name[:64]!r} exceeds {VALUE_BYTES} bytes", self._part.name[:64])

    def _end(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = _text(bytes(self._part.value), self._part.name)

    def _ended(self) -> None:
        self.ended = True

    def check(self) -> tuple[str, str]:
        """The file's name and purpose, once all has come. Raises ``RequestError``."""
        if not self.ended:
            raise _wrong("the form ends before its closing boundary")
        for name in self.fields:
            if name != "purpose":
                raise _wrong(f"the field {name[:64]!r} is not known; known are file and purpose", name[:64])
        if self.filename is None:
            raise _wrong("the form has no file; it must have the fields file and purpose", "file")
        purpose = self.fields.get("purpose")
        if purpose != PURPOSE:
            raise _wrong(f"purpose must be {PURPOSE!r}, got {purpose!r}", "purpose")
        return self.filename, purpose


def _wrong(message: str, param: str | None = None) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")


def _text(value: bytes, param: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise _wrong(f"{param[:64]!r} is not UTF-8", param[:64]) from error


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise _wrong("a file comes as multipart/form-data with the fields file and purpose")
    return boundary


async def receive_file(request: Request, shelf: Shelf) -> FileRecord:
    """Take an uploaded file into the shelf. Raises ``RequestError``; then nothing of it is left."""
    most = shelf.limits.file_bytes + FORM_BYTES
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise BodyTooLarge(shelf.limits.file_bytes)
    form = _Form()
    parser = form.parser(_boundary(request))
    draft = shelf.draft()
    try:
        await _receive(request, parser, form, draft, most)
        filename, purpose = form.check()
    except BaseException:
        shelf.abandon(draft)
        raise
    return await shelf.keep(draft, filename, purpose)


async def _receive(request: Request, parser: MultipartParser, form: _Form, draft: Draft, most: int) -> None:
    """Read it all. What is wrong is told at the end, for clients hear nothing while they send; too much ends it."""
    wrong: TenonError | None = None
    n_bytes, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client left while sending its file", code="client_closed")
        data, more = message.get("body", b""), message.get("more_body", False)
        n_bytes += len(data)
        if n_bytes > most:
            raise BodyTooLarge(draft.limit_bytes)
        if wrong is not None:
            continue
        try:
            parser.write(data)
        except FormParserError as error:
            wrong = _wrong(f"the form is not multipart/form-data: {error}")
        except RequestError as error:
            wrong = error
        if form.pending and wrong is None:
            piece = b"".join(form.pending)
            form.pending.clear()
            draft.count(len(piece))
            await asyncio.to_thread(draft.write, piece)
    if wrong is not None:
        raise wrong
