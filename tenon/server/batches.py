"""Batches: files of requests that are answered when nobody else waits, whatever happens to the server in between.

validating -> in_progress -> finalizing -> completed
    |             | |           |
    +-> failed    | |           +-> failed          the disk, or the tenant's part of it, is full
                  | +-> cancelling -> cancelled     what was answered is kept
                  +-> expired                       the rest is told as batch_expired

A batch is a record, written at every change of state, and a journal of its answered lines; from both a server that is
started again goes on. Each line goes through the server's own application as a request of the key that made the batch:
its checks, its quotas, its errors. While that key is unknown, or another model is served, the batch waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.types import ASGIApp, Message

from tenon.base import files as disk
from tenon.base.clock import Clock
from tenon.base.errors import ConfigError, ResourceError
from tenon.server.batch_lines import BadLine, Check, Journal, Line, Output, check_file, sound_lines, unanswered
from tenon.server.batch_run import Answer, BatchRun
from tenon.server.failures import Refusal
from tenon.server.files import Draft, Shelf, Store, StoreFull, new_id, no_disk, read_record
from tenon.server.keys import Caller
from tenon.server.limits import Limits
from tenon.server.service import Service

WINDOW_S: Final = 24 * 3600
MAX_TOLD: Final = 20
"""Wrong lines of a file that are told."""
LAST_LINES_S: Final = 2.0
"""How long answers that have come may take into the journal at the end."""
OPEN: Final = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
_log = logging.getLogger("tenon.server")


class BatchRecord(msgspec.Struct):
    """A batch on disk: what its owner is told, whose it is, and which model it was made for."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    model: str
    tenant: str
    key: str | None
    status: str = "validating"
    ending: str = "completed"
    """The status that follows ``finalizing``."""
    metadata: dict[str, str] | None = None
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        told = msgspec.structs.asdict(self)
        for name in ("tenant", "key", "ending", "total", "completed", "failed"):
            del told[name]
        told["errors"] = {"object": "list", "data": self.errors} if self.errors else None
        told["request_counts"] = {"total": self.total, "completed": self.completed, "failed": self.failed}
        for name in ("output_file_id", "error_file_id"):
            told[name] = None if self.status in OPEN else told[name]
        return told | {"object": "batch"}


class Batch:
    """A batch that has not ended: its record, and the run that is under way."""

    def __init__(self, record: BatchRecord, shelf: Shelf) -> None:
        self.record, self.shelf = record, shelf
        self.run: BatchRun | None = None
        self.running: asyncio.Task[None] | None = None

    @property
    def journal_path(self) -> Path:
        return self.shelf.folder / f"{self.record.id}.journal"

    def cancel(self) -> None:
        """Leave what is being asked; the engine forgets it at once."""
        if self.running is not None:
            self.running.cancel()


class Batches:
    """All batches of one server, and the tasks that work at them."""

    def __init__(
        self,
        store: Store,
        service: Service,
        limits: Limits,
        clock: Clock,
        caller_of: Callable[[str | None], Caller | None],
    ) -> None:
        """``caller_of`` a key's name: who that is now; of None, anybody, where there are no keys."""
        self.store = store
        self._service, self._limits, self._clock = service, limits, clock
        self._caller_of = caller_of
        self._slots = asyncio.Semaphore(limits.batch_concurrency)
        self._app: ASGIApp | None = None
        self._records: dict[str, BatchRecord] = {}
        self._open: dict[str, Batch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._n_asked = 0
        """Sequences of lines that are being asked."""
        self._stopping = False
        self._saving = asyncio.Lock()
        for path in store.batch_records():
            record = read_record(path, BatchRecord)
            self._records[record.id] = record
            if record.status not in OPEN:  # it ended just before the server did
                path.with_suffix(".journal").unlink(missing_ok=True)

    def attach(self, app: ASGIApp) -> None:
        """What answers lines: the application, behind the doors."""
        self._app = app

    def start(self) -> None:
        """Go on with what had not ended."""
        for record in self._records.values():
            if record.status in OPEN:
                self._begin(record)

    async def close(self) -> None:
        """Stop between two lines: what has been answered is written, the rest is for the next server."""
        self._stopping = True
        for batch in self._open.values():
            if batch.run is not None:
                batch.run.stop()
        tasks = set(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=LAST_LINES_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.store.close()

    # What clients ask for.

    def of(self, tenant: str) -> list[BatchRecord]:
        """The newest first."""
        mine = [record for record in self._records.values() if record.tenant == tenant]
        return sorted(mine, key=lambda record: (record.created_at, record.id), reverse=True)

    def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises ``Refusal`` (404); whether another tenant has it is not told."""
        record = self._records.get(batch_id)
        if record is None or record.tenant != tenant:
            raise Refusal(f"there is no batch {batch_id[:64]!r} here", status=404, code="not_found", param="batch_id")
        return record

    def needing(self, tenant: str, file_id: str) -> BatchRecord | None:
        """One that has not ended and reads this file."""
        mine = (record for record in self.of(tenant) if record.status in OPEN)
        return next((record for record in mine if record.input_file_id == file_id), None)

    async def create(
        self, caller: Caller, input_file_id: str, endpoint: str, window: str, metadata: dict[str, str] | None
    ) -> BatchRecord:
        """Raises ``Refusal``: no such file, or too many batches."""
        shelf = self.store.shelf(caller.tenant)
        found = shelf.get(input_file_id)
        if found.purpose != "batch":
            said = f"the file {input_file_id} was made for {found.purpose!r}; a batch reads files made for 'batch'"
            raise Refusal(said, status=400, code="invalid_value", param="input_file_id")
        mine = self.of(caller.tenant)
        n_open = sum(record.status in OPEN for record in mine)
        if n_open >= self._limits.max_open_batches:
            said = f"{n_open} of your batches are under way, which is the limit; wait for one, or cancel one"
            raise Refusal(said, status=429, code="too_many_batches", retry_after_s=30.0)
        if len(mine) >= self._limits.max_batches:
            await self._forget(mine[-1])
        now_s = int(self._clock.wall_s())
        record = BatchRecord(
            new_id("batch_"), endpoint, input_file_id, window, now_s, now_s + WINDOW_S, self._service.model,
            caller.tenant, caller.key.name if caller.key is not None else None, metadata=metadata,
        )  # fmt: skip
        self._records[record.id] = record
        try:
            await self._save(record)
        except BaseException:
            del self._records[record.id]
            raise
        self._begin(record)
        return record

    async def cancel(self, record: BatchRecord) -> None:
        """Raises ``Refusal`` (400) where it has ended."""
        if record.status not in OPEN:
            said = f"the batch {record.id} is {record.status} and cannot be cancelled any more"
            raise Refusal(said, status=400, code="batch_ended", param="batch_id")
        if record.status in ("finalizing", "cancelling"):
            return
        await self._enter(record, "cancelling")
        if batch := self._open.get(record.id):
            batch.cancel()
        elif not self._stopping:  # the disk had ended its work
            self._begin(record)

    # What becomes of each.

    def _begin(self, record: BatchRecord) -> None:
        batch = Batch(record, self.store.shelf(record.tenant))
        self._open[record.id] = batch
        task = asyncio.create_task(self._live(batch), name=record.id)
        self._tasks[record.id] = task
        task.add_done_callback(partial(self._ended, batch))

    def _ended(self, batch: Batch, task: asyncio.Task[None]) -> None:
        del self._tasks[batch.record.id], self._open[batch.record.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("batch %s cannot go on before the next start", batch.record.id, exc_info=error)

    async def _live(self, batch: Batch) -> None:
        """From the state it is in to its end, or to the server's."""
        record = batch.record
        if record.status == "validating":
            await self._validate(batch)
        if record.status in OPEN:
            try:
                journal = await asyncio.to_thread(Journal, batch.journal_path, mode=0o600)
            except ConfigError as error:
                _log.error("batch %s: %s", record.id, error)
                said = "what had been answered cannot be read any more"
                record.errors = [{"code": "journal_damaged", "line": None, "message": said, "param": None}]
                await self._enter(record, "failed")
                return
            with journal:
                batch.shelf.take_bytes(journal.n_bytes, is_limited=False)
                try:
                    await self._work(batch, journal)
                finally:
                    batch.shelf.give_bytes(journal.n_bytes)
            if record.status not in OPEN:
                batch.journal_path.unlink()

    async def _validate(self, batch: Batch) -> None:
        record = batch.record
        path = batch.shelf.content_path(record.input_file_id)
        limit = self._limits.max_batch_lines
        checking = partial(check_file, path, record.endpoint, max_lines=limit, max_bad=MAX_TOLD)
        check: Check = await asyncio.to_thread(checking)
        if check.bad:
            told = [{"code": bad.code, "line": bad.line, "message": str(bad), "param": bad.param} for bad in check.bad]
            record.errors = told
            await self._enter(record, "failed")
        elif record.status == "validating":
            record.total = len(check.ids)
            await self._enter(record, "in_progress")

    async def _work(self, batch: Batch, journal: Journal) -> None:
        record = batch.record
        self._count(record, journal)
        if record.status == "in_progress":
            await self._ask_all(batch, journal)
        if record.status == "cancelling":
            await self._finalize(batch, journal, "cancelled")
        elif record.status == "finalizing":
            await self._finalize(batch, journal, record.ending)
        elif len(journal.done) == record.total:
            await self._finalize(batch, journal, "completed")
        elif self._clock.wall_s() >= record.expires_at:
            await self._finalize(batch, journal, "expired")

    def _count(self, record: BatchRecord, journal: Journal) -> None:
        record.completed, record.failed = journal.tally.completed, journal.tally.failed

    async def _ask_all(self, batch: Batch, journal: Journal) -> None:
        """Until all is answered, the batch is cancelled or expires, or the server stops."""
        record = batch.record

        def took(output: Output, n_bytes: int) -> None:
            self._count(record, journal)
            batch.shelf.take_bytes(n_bytes, is_limited=False)
            if batch.shelf.n_bytes > self._limits.store_bytes:
                raise StoreFull(f"your files and batches take more than {self._limits.store_bytes} bytes")

        batch.run = BatchRun(
            sound_lines(batch.shelf.content_path(record.input_file_id), record.endpoint),
            partial(self._ask, record), journal, n_at_once=self._limits.batch_concurrency,
            room=partial(self._has_room, record), slot=self._slot, on_output=took,
        )  # fmt: skip
        if self._stopping:
            return
        running = asyncio.create_task(batch.run.run())
        batch.running = running
        try:
            await asyncio.wait({running}, timeout=max(0.0, record.expires_at - self._clock.wall_s()))
        finally:
            running.cancel()
            await asyncio.wait({running})
        if running.cancelled() or (error := running.exception()) is None:
            return
        if not isinstance(error, StoreFull | BadLine):
            raise error
        record.errors = [{"code": error.code, "line": None, "message": str(error), "param": None}]
        record.ending = "failed"
        await self._enter(record, "finalizing")

    def _has_room(self, record: BatchRecord, line: Line) -> bool:
        if record.model != self._service.model or self._caller(record) is None:
            return False
        # What is being asked counts twice once the engine has it: until then the service does not know of it.
        return self._service.has_room(line.n_sequences, self._n_asked)

    def _caller(self, record: BatchRecord) -> Caller | None:
        """Whose requests these are, while that key is still the same tenant's."""
        caller = self._caller_of(record.key)
        return caller if caller is not None and caller.tenant == record.tenant else None

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        async with self._slots:
            yield

    async def _ask(self, record: BatchRecord, line: Line) -> Answer:
        caller = self._caller(record)
        if self._app is None or caller is None:
            raise ResourceError(f"nobody answers for batch {record.id}")
        self._n_asked += line.n_sequences
        try:
            return await ask(self._app, caller, line)
        finally:
            self._n_asked -= line.n_sequences

    async def _finalize(self, batch: Batch, journal: Journal, ending: str) -> None:
        """Outputs and errors become files, under ids that are noted first: once more after a crash is the same."""
        record, shelf = batch.record, batch.shelf
        if record.output_file_id is None:
            record.output_file_id, record.error_file_id = new_id("file-"), new_id("file-")
            record.ending = ending
            await self._enter(record, "cancelling" if ending == "cancelled" else "finalizing")
        for name, is_good in (("output", True), ("error", False)):
            draft = shelf.draft(is_limited=False)
            try:
                await asyncio.to_thread(self._part, batch, ending, is_good, draft)
            except BaseException:
                shelf.abandon(draft)
                raise
            if draft.n_bytes:
                file_id = getattr(record, f"{name}_file_id")
                await shelf.keep(draft, f"{record.id}_{name}.jsonl", "batch_output", file_id)
            else:
                shelf.abandon(draft)
                setattr(record, f"{name}_file_id", None)
        record.failed = record.total - record.completed if ending == "expired" else record.failed
        await self._enter(record, ending)

    def _part(self, batch: Batch, ending: str, is_good: bool, draft: Draft) -> None:
        """The journal's lines that succeeded, or the others; with these, where it expired, also what is not in it."""
        record, done = batch.record, set()
        with batch.journal_path.open("rb") as file:
            for text in file:
                output = msgspec.json.decode(text, type=Output)
                done.add(output.custom_id)
                if output.succeeded is is_good:
                    draft.count(len(text))
                    draft.write(text)
        if ending != "expired" or is_good:
            return
        said = "the batch expired before this request was answered"
        for asked in sound_lines(batch.shelf.content_path(record.input_file_id), record.endpoint):
            if asked.custom_id not in done:
                text = msgspec.json.encode(unanswered(asked.custom_id, "batch_expired", said)) + b"\n"
                draft.count(len(text))
                draft.write(text)

    async def _enter(self, record: BatchRecord, status: str) -> None:
        if record.status != status:
            record.status = status
            setattr(record, f"{status}_at", int(self._clock.wall_s()))
        await self._save(record)

    async def _save(self, record: BatchRecord) -> None:
        """Raises ``Refusal`` (507)."""
        path = self.store.shelf(record.tenant).folder / f"{record.id}.json"
        async with self._saving:  # in order: the newest state is the one that stays
            try:
                await asyncio.to_thread(partial(disk.write_bytes, path, msgspec.json.encode(record), mode=0o600))
            except ResourceError as error:
                raise no_disk(error) from error

    async def _forget(self, record: BatchRecord) -> None:
        """The oldest gives way to the newest."""
        if record.status in OPEN:
            raise Refusal("too many batches are under way", status=429, code="too_many_batches", retry_after_s=30.0)
        del self._records[record.id]
        path = self.store.shelf(record.tenant).folder / f"{record.id}.json"
        await asyncio.to_thread(partial(path.unlink, missing_ok=True))


async def ask(app: ASGIApp, caller: Caller, line: Line) -> Answer:
    """One line through the application, as a request of this caller."""
    request_id = f"batch-{secrets.token_hex(12)}"
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": line.url, "raw_path": line.url.encode(), "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(line.body)).encode())],
        "client": None, "server": None, "caller": caller, "request_id": request_id,
    }  # fmt: skip
    sent, status, headers, body = False, 0, {}, bytearray()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # the client stays until it is cancelled
        sent = True
        return {"type": "http.request", "body": line.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], {name.lower(): value for name, value in message["headers"]}
        else:
            body.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if status == 0:
            raise
        _log.exception("a line of a batch has failed")  # it has its answer, as any client's request would
    retry_after = headers.get(b"retry-after")
    return Answer(status, request_id, bytes(body), float(retry_after) if retry_after is not None else None)
