"""``tenon batch``: a file of requests to a file of answers, through any end in between."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenon.cli import main
from tests.server.conftest import PATIENCE_S, Running, free_port, hash_server, wait_for, write_model

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from hash_server(tmp_path_factory)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 3} | body
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": asked}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(text) for text in path.read_bytes().splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def batch(*words: object) -> int:
    return main.main(["batch", *map(str, words)])


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tenon.cli", "batch", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_running_server_answers_and_the_rest_is_asked_only_once(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(f"c{i}") for i in range(6)]
    lines[2] |= {
        "url": "/v1/chat/completions",
        "body": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
    }
    lines[3] |= {"url": "/v1/responses", "body": {"model": "tiny", "input": "a", "max_output_tokens": 2}}
    lines[4]["body"]["temperature"] = "hot"
    asked = write(tmp_path / "requests.jsonl", lines)
    assert batch(asked, "--url", server.url + "/v1", "--concurrency", 2) == 1  # one line is wrong
    said = capsys.readouterr().err
    assert "5 done, 1 failed; " in said
    assert "output tokens/s" in said
    output = tmp_path / "requests.output.jsonl"
    found = read(output)
    assert set(found) == {f"c{i}" for i in range(6)}
    assert {name: each["response"]["status_code"] for name, each in found.items() if name == "c4"} == {"c4": 400}
    assert found["c2"]["response"]["body"]["object"] == "chat.completion"
    assert found["c3"]["response"]["body"]["object"] == "response"
    assert all(each["id"] and each["error"] is None and each["response"]["request_id"] for each in found.values())

    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + b'{"id": "torn')
    n_before = server.metrics()["tenon_requests_started_total"]
    write(asked, [*lines, line("more")])
    batch(asked, "--url", server.url + "/v1")
    assert set(read(output)) == {*found, "more"}
    assert output.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:4]))
    assert server.metrics()["tenon_requests_started_total"] - n_before <= 3
    assert "4 of 7 requests have been answered before" in capsys.readouterr().err


WRONG: list[tuple[list[Any], list[str], str]] = [
    ([line("a"), line("a")], [], "line 2: custom_id 'a' is that of line 1 too"),
    ([line("a"), line("b") | {"url": "/v1/moderations"}], [], 'line 2: url must be .*, got "/v1/moderations"'),
    ([line("a", stream=True)], [], "line 1: body.stream must be false in a batch, got True"),
    ([], [], "the file is empty"),
    ([line("a")], ["--concurrency", "0"], "concurrency must be at least 1, got 0"),
    ([line("a")], ["--url", "http://127.0.0.1:1/v1", "--model", "x"], "url names another"),
    ([line("a")], ["--url", "nowhere"], "a server is named by a URL"),
    ([line("a"), line("b", model="big")], [], r"got 'tiny' \(line 1\) and 'big' \(line 2\); say which with --model"),
    ([line("a")], ["--model", "embedded"], "served as 'embedded' and no line asks for that.*--served-name tiny"),
]


@pytest.mark.parametrize(("lines", "words", "said"), WRONG)
def test_what_is_wrong_is_one_sentence_before_anything_is_written(
    lines: list[Any], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(write(tmp_path / "requests.jsonl", lines), *words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(said, told), told
    assert not (tmp_path / "requests.output.jsonl").exists()


def test_an_output_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = write(tmp_path / "requests.jsonl", [line("a")])
    assert batch(asked, "--output", asked, "--url", "http://127.0.0.1:1/v1") == 2
    assert "output must be another file than the requests" in capsys.readouterr().err
    output = tmp_path / "out.jsonl"
    output.write_text('{"id": "x", "custom_id": "z", "response": null, "error": {"code": "c", "message": "m"}}\n')
    assert batch(asked, "--output", output, "--url", "http://127.0.0.1:1/v1") == 2
    assert "line 1 answers custom_id 'z', which" in capsys.readouterr().err
    output.write_text("my notes\n")
    assert batch(asked, "--output", output, "--url", "http://127.0.0.1:1/v1") == 2
    assert output.read_text() == "my notes\n"


def test_kill_in_the_middle_and_go_on(tmp_path: Path) -> None:
    """With a server of its own, which dies with it."""
    (tmp_path / "tiny").mkdir()
    model = write_model(tmp_path / "tiny")
    n = 80
    asked = write(tmp_path / "requests.jsonl", [line(f"c{i}", max_tokens=60, ignore_eos=True) for i in range(n)])
    output = tmp_path / "out.jsonl"
    words = [asked, "--output", output, "--model", model, "--executor", "hash", "--concurrency", "4"]
    process = started(*words)
    wait_for(lambda: n_lines(output) > 10)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    before = output.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 10 < before.count(b"\n") < n
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_')
    process = started(*words)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert f"{n} done, 0 failed" in said
    assert output.read_bytes().startswith(before)
    assert set(read(output)) == {f"c{i}" for i in range(n)}


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_an_interrupt_waits_for_what_was_asked(server: Running, tmp_path: Path, own: bool) -> None:
    (tmp_path / "tiny").mkdir()
    where = ["--model", write_model(tmp_path / "tiny"), "--executor", "hash"] if own else ["--url", server.url + "/v1"]
    asked = write(tmp_path / "requests.jsonl", [line(f"c{i}", max_tokens=60, ignore_eos=True) for i in range(2000)])
    output = tmp_path / "requests.output.jsonl"
    process = started(asked, "--concurrency", "8", *where)
    wait_for(lambda: n_lines(output) > 10)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, said
    assert "not answered" in said
    assert "the same command goes on from here" in said
    assert 10 < len(read(output)) < 2000
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_server_that_is_not_there_ends_it_with_a_sentence(tmp_path: Path) -> None:
    asked = write(tmp_path / "requests.jsonl", [line("a"), line("b"), line("c"), line("d"), line("e"), line("f")])
    process = started(asked, "--url", f"http://127.0.0.1:{free_port()}/v1")
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "does not answer (connect: " in said
    assert "Traceback" not in said
