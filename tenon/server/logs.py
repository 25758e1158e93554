"""The server's log: text for a terminal, or a JSON object a line; what is in it, and what never is.

A record has a time, a level, a message and fields. Of a request it tells who (the key's name), what came of it, how
many tokens and how long; never a prompt, an output, a key, a header or a query. Records are written by a thread of
their own: whoever reads the log slowly, or not at all, loses records and holds nobody up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from tenon.engine.messages import Ready
from tenon.server.flights import Flight

FORMATS: Final = ("text", "json")
LEVELS: Final = ("info", "warning", "error")
USUAL_LEVELS: Final = {"text": "warning", "json": "info"}
MAX_QUEUED: Final = 10_000
LAST_WORDS_S: Final = 1.0
ACCESS: Final = logging.getLogger("tenon.access")
"""A record for each HTTP answer."""
REQUESTS: Final = logging.getLogger("tenon.requests")
"""A record for each prompt that the engine was given."""
_SERVER: Final = logging.getLogger("tenon.server")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_WORD: Final = 200


def told(**fields: Any) -> dict[str, Any]:
    """Fields of a record, as ``extra`` of a logging call."""
    return {"fields": fields}


def _escaped(text: str) -> str:
    """On one line, with nothing that a terminal acts on."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "logger": record.name, "message": _escaped(record.getMessage()),
        }  # fmt: skip
        said |= {name: value for name, value in getattr(record, "fields", {}).items() if name not in said}
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said, enc_hook=str).decode()


class TextFormatter(logging.Formatter):
    """One line; a trace follows it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        fields = dict(getattr(record, "fields", {}))
        trace = str(fields.pop("trace", "")) or (self.formatException(record.exc_info) if record.exc_info else "")
        words = [f"{name}={value}" for name, value in fields.items() if value is not None]
        line = _escaped(" ".join([f"{at} {record.levelname.lower()}: {record.getMessage()}", *words]))
        return "\n".join([line, *(f"    {_escaped(row)}" for row in trace.splitlines())])


class _Queued(logging.Handler):
    """Hands records to the thread that writes them. Drops what does not fit, and says how much once there is room."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]) -> None:
        super().__init__()
        self._records = records
        self._n_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._n_dropped:
                said = f"{self._n_dropped} records are lost: nobody read the log"
                lost = {"name": "tenon", "levelno": logging.WARNING, "levelname": "WARNING", "msg": said}
                self._records.put_nowait(logging.makeLogRecord(lost))
                self._n_dropped = 0
            self._records.put_nowait(record)
        except queue.Full:
            self._n_dropped += 1


class Log:
    """The log of this process from ``start`` to ``close``, to the descriptor ``fd``. ``level``: by default warnings and
    errors as text, all as JSON."""

    def __init__(self, form: str = "text", level: str | None = None, fd: int = 2) -> None:
        self._level = (level or USUAL_LEVELS[form]).upper()
        self._formatter = JsonFormatter() if form == "json" else TextFormatter()
        self._fd = fd
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_QUEUED)
        self._handler = _Queued(self._records)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._loggers = [logging.getLogger(name) for name in ("tenon", "uvicorn.error", "asyncio", "opentelemetry")]
        self._was = [(logger.level, logger.propagate) for logger in self._loggers]

    @property
    def n_queued(self) -> int:
        """Records that are not written yet."""
        return self._records.qsize()

    def start(self) -> None:
        self._loggers[0].setLevel(self._level)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves
        for logger in self._loggers:
            logger.propagate = False
            logger.addHandler(self._handler)
        self._thread.start()

    def close(self) -> None:
        """Write what is left, if somebody reads it."""
        for logger, (level, propagate) in zip(self._loggers, self._was, strict=True):
            logger.removeHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = propagate
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=LAST_WORDS_S)
            self._thread.join(LAST_WORDS_S)

    def _write(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                text = self._formatter.format(record)
            except Exception as error:  # one record that cannot be told must not end the log
                said = f"a record cannot be written: {type(error).__name__}"
                lost = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname, "msg": said}
                text = self._formatter.format(logging.makeLogRecord(lost))
            line = (text + "\n").encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # a full disk, a reader who has left: no reason to stop
                while line:
                    line = line[os.write(self._fd, line) :]


def log_answer(method: str, path: str, status: int, duration_s: float, request_id: str, key: str | None) -> None:
    """One HTTP answer, whole: a stream's duration is that of the stream."""
    if ACCESS.isEnabledFor(logging.INFO):
        method, path = method[:_MAX_WORD], path[:_MAX_WORD]
        fields = told(request_id=request_id, key=key, method=method, path=path, status=status or 499,
                      duration_s=round(duration_s, 4))  # fmt: skip
        ACCESS.info("answered", extra=fields)


def log_request(flight: Flight, reason: str, now_s: float) -> None:
    """One prompt that the engine was given has ended."""
    if REQUESTS.isEnabledFor(logging.INFO):
        add, key = flight.add, flight.caller.key
        ttft_s = None if flight.first_s is None else round(flight.first_s - add.arrival_s, 4)
        fields = told(request_id=add.request_id, key=None if key is None else key.name, outcome=reason, n=add.n,
                      prompt_tokens=len(add.prompt), cached_tokens=flight.cached_tokens, output_tokens=flight.n_output,
                      ttft_s=ttft_s, e2e_s=round(now_s - add.arrival_s, 4), engines_lost=flight.n_deaths)  # fmt: skip
        REQUESTS.info("request ended", extra=fields)


class LogConsole:
    """Start and end of a server as records, where there is no terminal to draw on."""

    def __init__(self) -> None:
        self._phase = ""

    def phase(self, name: str, fraction: float, detail: str) -> None:
        if name != self._phase:
            self._phase = name
            _SERVER.info("phase", extra=told(phase=name, detail=detail))

    def ready(self, url: str, model: str, ready: Ready) -> None:
        facts = told(url=url, model=model, max_model_len=ready.max_model_len, kv_bytes=ready.kv_bytes)
        _SERVER.info("ready", extra=facts)

    def draining(self, n_running: int, drain_s: float) -> None:
        _SERVER.info("draining", extra=told(in_flight=n_running, drain_s=drain_s))

    def failed(self, message: str, trace: str) -> None:
        _SERVER.error(message, extra=told(trace=trace) if trace else None)
