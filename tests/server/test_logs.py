"""What the log says, and what it never does."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenon.server.logs import MAX_QUEUED, JsonFormatter, Log, TextFormatter, told
from tests.server.conftest import PATIENCE_S, Running, wait_for

Start = Callable[..., Running]
KEY = "a-key-that-nobody-may-read"
PROMPT = "my secret thought"
KEYS = f'[[key]]\nname = "alice"\nkey = "{KEY}"\nwatch = true\n'


def record(message: str, *args: object, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("tenon.server", logging.ERROR, "", 0, message, args, None)
    made.created = 1_000_000.5
    made.__dict__ |= told(**fields)
    return made


def test_a_line_of_json() -> None:
    line = JsonFormatter().format(record("it \x1b[31m said %r\n", "a\u2028b", n=3, path=Path("/x"), level="mine"))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-12T13:46:40.500+00:00", "level": "error", "logger": "tenon.server",
        "message": r"it \u001b[31m said 'a\u2028b'\u000a", "n": 3, "path": "/x",
    }  # fmt: skip


def test_a_line_of_text() -> None:
    line = TextFormatter().format(record("lost\r\n12:00:00 error: forged", n=3, key=None, trace="a\n\x1b]0;b"))
    assert line.splitlines() == [
        r"13:46:40 error: lost\u000d\u000a12:00:00 error: forged n=3", "    a", r"    \u001b]0;b",
    ]  # fmt: skip


def test_a_log_that_nobody_reads_loses_records_and_says_so() -> None:
    reader, writer = os.pipe()
    log = Log("json", fd=writer)
    log.start()
    logger = logging.getLogger("tenon.test_logs")
    for number in range(2 * MAX_QUEUED):
        logger.warning("number %d", number)
    assert log.n_queued == MAX_QUEUED
    with os.fdopen(reader, "rb") as lines:
        heard = [json.loads(next(lines))["message"] for _ in range(MAX_QUEUED)]
        assert heard == [f"number {number}" for number in range(MAX_QUEUED)]
        wait_for(lambda: log.n_queued < MAX_QUEUED)
        logger.warning("later")
        while heard[-1] != "later":
            heard.append(json.loads(next(lines))["message"])
    assert heard[-2].endswith("records are lost: nobody read the log")
    told = [message for message in heard if message.endswith("records are lost: nobody read the log")]
    n_lost = sum(int(message.split()[0]) for message in told)  # told before, if the thread wrote slower than we do
    assert len(heard) - 1 - len(told) + n_lost == 2 * MAX_QUEUED
    log.close()
    os.close(writer)


def test_a_record_that_cannot_be_written_does_not_end_the_log() -> None:
    reader, writer = os.pipe()
    log = Log("json", fd=writer)
    log.start()
    logger = logging.getLogger("tenon.test_logs")
    logger.warning("%d", "no number")
    logger.warning("next")
    with os.fdopen(reader, "rb") as lines:
        assert [json.loads(next(lines))["message"] for _ in range(2)] == [
            "a record cannot be written: TypeError",
            "next",
        ]
    log.close()
    os.close(writer)


def test_a_servers_log_tells_what_happened_and_no_secret(own_server: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    server = own_server("--keys", str(keys), "--log-format", "json")

    def post(body: dict[str, Any], path: str = "/v1/completions", **headers: str) -> httpx.Response:
        sent = {"authorization": f"Bearer {KEY}"} | headers
        return httpx.post(server.url + path, json={"model": "tiny"} | body, headers=sent, timeout=PATIENCE_S)

    asked = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
    done = post(asked, **{"x-request-id": "mine"})
    output = done.json()["choices"][0]["text"]
    assert post(asked, path=f"/v1/completions?token={KEY}", cookie=f"session={KEY}").status_code == 200
    assert post(asked | {"temperature": PROMPT}).status_code == 400
    assert post(asked | {"guided_regex": f"({PROMPT}"}).status_code == 400
    assert post(asked | {"model": PROMPT}).status_code == 404
    assert post(asked, authorization=f"Bearer {KEY}x").status_code == 401
    chat = [{"role": "user", "content": PROMPT}]
    assert post({"messages": chat, "max_tokens": 2}, path="/v1/chat/completions").status_code == 200
    os.kill(server.engine_pid(), signal.SIGKILL)
    wait_for(lambda: post(asked).status_code == 200)
    assert server.stop() == 0
    assert server.process.stderr is not None
    text = server.process.stderr.read()
    for secret in (KEY, PROMPT, output, "session="):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    said = [line["message"] for line in lines]
    assert "ready" in said
    assert any(message.startswith("ready -> restarting") for message in said)
    answers = [line for line in lines if line["logger"] == "tenon.access"]
    first = next(line for line in answers if line["request_id"] == "mine")
    assert (first["key"], first["path"], first["status"]) == ("alice", "/v1/completions", 200)
    assert {line["status"] for line in answers} >= {200, 400, 401, 404}
    ended = next(line for line in lines if line["logger"] == "tenon.requests")
    assert ended["request_id"].startswith("mine-")
    expected = {"key": "alice", "outcome": "length", "n": 1, "output_tokens": 5, "engines_lost": 0}
    assert expected.items() <= ended.items()
    assert 0 < ended["ttft_s"] <= ended["e2e_s"]


def test_a_log_that_nobody_reads_does_not_hold_the_server_up(own_server: Start) -> None:
    server = own_server("--log-format", "json", wait_ready=True)
    with httpx.Client(headers={"x-request-id": "a" * 128}, timeout=PATIENCE_S) as client:
        for _ in range(500):  # a pipe holds 64 KiB
            assert client.get(server.url + "/livez").status_code == 200
    assert server.stop() == 0


def test_text_is_for_warnings_unless_more_is_asked_for(own_server: Start) -> None:
    for options, heard in (((), False), (("--log-level", "info"), True)):
        server = own_server(*options)
        server.complete(max_tokens=1)
        assert server.stop() == 0
        assert server.process.stderr is not None
        assert ("path=/v1/completions status=200" in server.process.stderr.read()) is heard


@pytest.mark.parametrize("words", [["--log-format", "xml"], ["--log-level", "loud"], ["--traces", "collector:4318"]])
def test_what_is_wrong_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from tenon.cli.main import main

    try:
        status = main(["serve", "--port", "0", *words])
    except SystemExit as stop:  # argparse's
        status = int(str(stop.code))
    assert status == 2
    assert words[1] in capsys.readouterr().err
