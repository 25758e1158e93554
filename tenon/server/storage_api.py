"""``/v1/files`` and ``/v1/batches``: OpenAI's shapes over what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tenon.server.admission import Admission
from tenon.server.batch_lines import URLS
from tenon.server.batches import Batches
from tenon.server.failures import Refusal
from tenon.server.files import FileRecord, Shelf
from tenon.server.keys import Caller
from tenon.server.limits import UPLOAD_PATH
from tenon.server.protocol import convert, json_object
from tenon.server.uploads import receive_file

BATCHES_PATH: Final = "/v1/batches"
MAX_METADATA: Final = 16
_CONTENT_HEADERS: Final = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: None = None
    """Accepted at the value that asks for nothing: what is stored stays until it is deleted."""


def parse_batch(body: bytes) -> BatchRequest:
    """Raises ``RequestError``."""
    asked = convert(json_object(body), BatchRequest)
    if asked.endpoint not in URLS:
        raise _wrong("endpoint", f"must be {' or '.join(URLS)}, got {asked.endpoint[:64]!r}")
    metadata = asked.metadata or {}
    if len(metadata) > MAX_METADATA or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise _wrong("metadata", f"has at most {MAX_METADATA} pairs, keys of 64 and values of 512 characters")
    return asked


def _wrong(param: str, said: str) -> Refusal:
    return Refusal(f"{param} {said}", status=400, code="invalid_value", param=param)


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class StorageRoutes:
    """The handlers. ``batches`` is None where nothing is stored, and ``why_not`` says why."""

    def __init__(self, batches: Batches | None, admission: Admission, why_not: str) -> None:
        self._batches, self._admission, self._why_not = batches, admission, why_not

    def routes(self) -> list[Route]:
        get, post = ["GET"], ["POST"]
        one, batch = UPLOAD_PATH + "/{file_id}", BATCHES_PATH + "/{batch_id}"
        return [
            Route(UPLOAD_PATH, self.upload, methods=post),
            Route(UPLOAD_PATH, self.files, methods=get),
            Route(one, self.file, methods=get),
            Route(one, self.delete_file, methods=["DELETE"]),
            Route(one + "/content", self.content, methods=get),
            Route(BATCHES_PATH, self.create_batch, methods=post),
            Route(BATCHES_PATH, self.list_batches, methods=get),
            Route(batch, self.batch, methods=get),
            Route(batch + "/cancel", self.cancel_batch, methods=post),
        ]

    def _store(self) -> Batches:
        if self._batches is None:
            raise Refusal(f"this server stores no files: {self._why_not}", status=503, code="no_store")
        return self._batches

    def _shelf(self, request: Request) -> Shelf:
        return self._store().store.shelf(_caller(request).tenant)

    async def upload(self, request: Request) -> Response:
        _caller(request).take_request()
        self._admission.require_spare_memory()
        return Json(await receive_file(request, self._shelf(request)))

    async def files(self, request: Request) -> Response:
        asked = _query(request, {"after", "limit", "order", "purpose"})
        found = self._shelf(request).files()
        if (order := asked.get("order", "desc")) not in ("asc", "desc"):
            raise _wrong("order", f"must be asc or desc, got {order[:64]!r}")
        if order == "desc":
            found.reverse()
        if "purpose" in asked:
            found = [record for record in found if record.purpose == asked["purpose"]]
        return _page(found, asked, most=10_000, usual=10_000)

    async def file(self, request: Request) -> Response:
        return Json(self._shelf(request).get(request.path_params["file_id"]))

    async def delete_file(self, request: Request) -> Response:
        file_id, tenant = request.path_params["file_id"], _caller(request).tenant
        if (batch := self._store().needing(tenant, file_id)) is not None:
            said = f"the file is the input of {batch.id}, which has not ended; cancel that first"
            raise Refusal(said, status=400, code="file_in_use", param="file_id")
        await self._shelf(request).delete(file_id)
        return Json({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        pieces = self._shelf(request).content(request.path_params["file_id"])
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=_CONTENT_HEADERS)

    async def create_batch(self, request: Request) -> Response:
        caller, batches = _caller(request), self._store()
        caller.take_request()
        asked = parse_batch(await self._admission.read(request))
        made = await batches.create(
            caller, asked.input_file_id, asked.endpoint, asked.completion_window, asked.metadata
        )  # fmt: skip
        return Json(made.to_json())

    async def list_batches(self, request: Request) -> Response:
        asked = _query(request, {"after", "limit"})
        return _page(self._store().of(_caller(request).tenant), asked, most=100, usual=20)

    async def batch(self, request: Request) -> Response:
        return Json(self._store().get(_caller(request).tenant, request.path_params["batch_id"]).to_json())

    async def cancel_batch(self, request: Request) -> Response:
        caller, batches = _caller(request), self._store()
        caller.take_request()
        record = batches.get(caller.tenant, request.path_params["batch_id"])
        await batches.cancel(record)
        return Json(record.to_json())


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


def _query(request: Request, known: set[str]) -> dict[str, str]:
    for name in request.query_params:
        if name not in known:
            raise _wrong(name[:64], f"is not known here; known are {', '.join(sorted(known))}")
    return dict(request.query_params)


def _page(records: Sequence[Any], asked: dict[str, str], *, most: int, usual: int) -> Json:
    """Those after the one named, so many of them. Raises ``Refusal``."""
    limit = asked.get("limit", str(usual))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise _wrong("limit", f"must be from 1 to {most}, got {limit[:64]!r}")
    ids = [record.id for record in records]
    first = 0
    if (after := asked.get("after")) is not None:
        if after not in ids:
            raise _wrong("after", f"names nothing in this list, got {after[:64]!r}")
        first = ids.index(after) + 1
    chosen = records[first : first + int(limit)]
    told = [record if isinstance(record, FileRecord) else record.to_json() for record in chosen]
    bounds = {"first_id": chosen[0].id if chosen else None, "last_id": chosen[-1].id if chosen else None}
    return Json({"object": "list", "data": told} | bounds | {"has_more": first + len(chosen) < len(records)})
