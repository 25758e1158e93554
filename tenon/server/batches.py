"""Batches while the server serves: OpenAI's ``/v1/batches`` over files that were left here.

    validating --> in_progress --> finalizing --> completed
        |              |
        v              +--> cancelling --> cancelled
      failed

A batch is a file of its own beside the tenant's files, and its answers grow in another: after a restart it goes on with
what is not answered yet. It starts requests only while the server has room beside those who wait for an answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from tenon.base import files
from tenon.base.clock import Clock
from tenon.base.errors import RequestError, TenonError
from tenon.server.batch import URLS, Answers, Ask, answer_all, read_lines
from tenon.server.failures import Refusal
from tenon.server.files import FileStore, tenant_folder
from tenon.server.protocol import convert, json_object

AT_ONCE: Final = 16
MAX_OPEN: Final = 16
"""Batches of one tenant that are not over."""
WINDOW: Final = "24h"
OVER: Final = ("completed", "failed", "cancelled")
_ID: Final = re.compile(r"batch_[0-9a-f]{24}")
_log = logging.getLogger("tenon.server")

AskFor = Callable[[str], Ask]
"""How a tenant's requests are asked."""


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: str = WINDOW
    metadata: dict[str, str] | None = None


class State(msgspec.Struct, kw_only=True):
    """What is kept of a batch, as OpenAI's object has it."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_at: int
    metadata: dict[str, str] | None = None
    status: str = "validating"
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    times: dict[str, int] = {}
    """When it came to be what: ``in_progress_at`` and so on."""

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        names = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired")
        return {
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "input_file_id": self.input_file_id,
            "completion_window": WINDOW, "status": self.status, "created_at": self.created_at, "expires_at": None,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "output_file_id": self.output_file_id, "error_file_id": None, "metadata": self.metadata,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
        } | {f"{name}_at": self.times.get(name) for name in names}  # fmt: skip


@dataclass
class _Running:
    task: asyncio.Task[None]
    cancelled: bool = False


@dataclass
class Batches:
    """All tenants' batches. Used by one event loop."""

    store: Path
    files: FileStore
    clock: Clock
    ask_for: AskFor
    has_room: Callable[[], bool]
    """Whether a request of a batch would take nobody's place."""
    _running: dict[str, _Running] = field(default_factory=dict)
    _states: dict[str, State] = field(default_factory=dict)

    def resume(self) -> None:
        """Read what is there, and go on with what is not over. At a start."""
        for path in sorted(self.store.glob("*/batch_*.json")):
            state = msgspec.json.decode(path.read_bytes(), type=State)
            self._states[state.id] = state
            if state.status == "cancelling":
                self._enter(state, "cancelled")
            elif state.status not in OVER:
                self._begin(state)

    def create(self, body: bytes, tenant: str) -> State:
        """Take a batch up. Raises ``RequestError`` naming the field."""
        asked = convert(json_object(body), BatchRequest)
        if asked.endpoint not in URLS:
            said = f"endpoint must be {' or '.join(URLS)}, got {asked.endpoint!r:.80}"
            raise RequestError(said, param="endpoint", code="invalid_value")
        if asked.completion_window != WINDOW:
            said = f"completion_window must be {WINDOW!r}, got {asked.completion_window!r:.40}"
            raise RequestError(said, param="completion_window", code="invalid_value")
        self.files.get(tenant, asked.input_file_id)
        n_open = sum(one.tenant == tenant and one.status not in OVER for one in self._states.values())
        if n_open >= MAX_OPEN:
            said = f"{n_open} batches are not over yet, which is the limit"
            raise Refusal(said, status=429, code="rate_limit_exceeded", retry_after_s=30.0)
        state = State(
            id=f"batch_{secrets.token_hex(12)}", tenant=tenant, endpoint=asked.endpoint,
            input_file_id=asked.input_file_id, created_at=int(self.clock.wall_s()), metadata=asked.metadata,
        )  # fmt: skip
        self._states[state.id] = state
        self._save(state)
        self._begin(state)
        return state

    def list(self, tenant: str) -> list[State]:
        """The tenant's, newest first."""
        found = [one for one in self._states.values() if one.tenant == tenant]
        return sorted(found, key=lambda one: (one.created_at, one.id), reverse=True)

    def get(self, tenant: str, batch_id: str) -> State:
        """Raises ``Refusal`` (404)."""
        state = self._states.get(batch_id) if _ID.fullmatch(batch_id) else None
        if state is None or state.tenant != tenant:
            raise Refusal(f"there is no batch {batch_id!r:.80}", status=404, code="batch_not_found", param="batch_id")
        return state

    def cancel(self, tenant: str, batch_id: str) -> State:
        """What is in flight is given up; what is answered is kept. Raises ``Refusal``: 404, or 409 where it is over."""
        state = self.get(tenant, batch_id)
        if state.status in OVER:
            said = f"the batch is {state.status} and cannot be cancelled"
            raise Refusal(said, status=409, code="batch_over")
        running = self._running.get(batch_id)
        self._enter(state, "cancelling")
        if running is not None:
            running.cancelled = True
            running.task.cancel()
        return state

    async def close(self) -> None:
        """Stop for now: what is not answered is asked for again after the next start."""
        for running in list(self._running.values()):
            running.task.cancel()
        await asyncio.gather(*(one.task for one in self._running.values()), return_exceptions=True)

    # -- inside -----------------------------------------------------------------------------------------------

    def _begin(self, state: State) -> None:
        self._running[state.id] = _Running(asyncio.create_task(self._run(state)))

    async def _run(self, state: State) -> None:
        try:
            await self._answer(state)
        except asyncio.CancelledError:
            if self._running[state.id].cancelled:
                self._finish(state, "cancelled")
        except* TenonError as group:
            error = group.exceptions[0]
            param = error.param if isinstance(error, RequestError) else None
            state.errors = [{"code": "invalid_batch", "message": str(error), "param": param, "line": None}]
            _log.warning("batch %s failed: %s", state.id, error)
            self._enter(state, "failed")
        finally:
            self._running.pop(state.id, None)

    async def _answer(self, state: State) -> None:
        source = self.files.get(state.tenant, state.input_file_id)
        data = await asyncio.to_thread(source.path.read_bytes)
        lines = await asyncio.to_thread(read_lines, data, endpoint=state.endpoint)
        state.total = len(lines)
        if state.status == "validating":
            self._enter(state, "in_progress")
        with Answers(self._answers_path(state)) as answers:

            def count(*_: object) -> None:
                state.failed = answers.n_failed
                state.completed = len(answers.done) - state.failed

            count()
            ask = self.ask_for(state.tenant)
            await answer_all(lines, ask, answers, at_once=AT_ONCE, may_start=self.has_room, on_answer=count)
        self._enter(state, "finalizing")
        self._finish(state, "completed")

    def _finish(self, state: State, status: str) -> None:
        """Its answers become a file; what was cancelled has those that came."""
        path = self._answers_path(state)
        if path.exists() and path.stat().st_size:
            state.output_file_id = self.files.adopt(state.tenant, path, f"{state.id}_output.jsonl").id
        self._enter(state, status)

    def _enter(self, state: State, status: str) -> None:
        state.status = status
        state.times = state.times | {status: int(self.clock.wall_s())}
        self._save(state)

    def _save(self, state: State) -> None:
        path = tenant_folder(self.store, state.tenant) / f"{state.id}.json"
        files.write_bytes(path, msgspec.json.encode(state), mode=0o600)

    def _answers_path(self, state: State) -> Path:
        return tenant_folder(self.store, state.tenant) / f"{state.id}.answers"
