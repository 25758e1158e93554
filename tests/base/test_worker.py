from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tenon.base.clock import SYSTEM
from tenon.base.errors import ResourceError
from tenon.base.worker import LineWorker

PROGRAM = """
import json, os, sys, time
hello = json.loads(sys.stdin.readline())
if hello.get("refuse"):
    print(json.dumps({"refused": hello["refuse"]}), flush=True)
    sys.exit()
time.sleep(hello.get("slow", 0))
print(json.dumps({}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        os._exit(3)
    if request.get("hang"):
        time.sleep(600)
    number = request["number"] - request.get("wrong", 0)
    print(json.dumps({"pid": os.getpid(), "echo": request.get("text", ""), "number": number}), flush=True)
"""

Make = Callable[..., LineWorker]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    made: list[LineWorker] = []

    def begin(*, start_s: float = 60.0, **hello: Any) -> LineWorker:
        made.append(LineWorker("test worker", str(program), hello=hello, clock=SYSTEM, start_s=start_s))
        return made[-1]

    yield begin
    for worker in made:
        worker.kill()


def ask(worker: LineWorker, **request: Any) -> dict[str, Any] | None:
    return worker.ask(request, wall_s=30.0, max_reply=1 << 22)


def test_a_worker_answers_again_and_again(make: Make) -> None:
    worker = make()
    replies = [ask(worker, text="x" * n) for n in (1, 1 << 20, 3)]
    assert [len(reply["echo"]) for reply in replies if reply] == [1, 1 << 20, 3]
    assert len({reply["pid"] for reply in replies if reply}) == 1


def test_one_that_dies_is_replaced(make: Make) -> None:
    worker = make()
    first = ask(worker)
    assert ask(worker, die=True) is None
    second = ask(worker)
    assert first
    assert second
    assert first["pid"] != second["pid"]


def test_one_that_hangs_is_killed(make: Make) -> None:
    worker = make()
    first = ask(worker)
    assert worker.ask({"hang": True}, wall_s=0.1, max_reply=99) is None
    assert not worker.is_alive
    assert first
    with pytest.raises(ProcessLookupError):
        os.kill(first["pid"], 0)


def test_an_answer_to_another_request_is_never_handed_out(make: Make) -> None:
    worker = make()
    assert ask(worker, wrong=1) is None
    assert not worker.is_alive


def test_a_long_answer_is_refused(make: Make) -> None:
    assert make().ask({"text": "x" * 5000}, wall_s=30.0, max_reply=4000) is None


def test_one_that_cannot_start_says_why(make: Make) -> None:
    with pytest.raises(ResourceError, match="cannot start: no licence"):
        ask(make(refuse="no licence"))


def test_one_that_takes_too_long_to_start_is_given_up(make: Make) -> None:
    with pytest.raises(ResourceError, match=r"took over 0\.1 s to start"):
        ask(make(slow=600, start_s=0.1))


def test_what_is_sent_is_answered_later(make: Make) -> None:
    worker = make()
    worker.begin()
    worker.send({"text": "later"})
    assert worker.is_starting
    reply = None
    while reply is None:
        assert worker.is_alive
        reply = worker.receive(0.05, 1 << 10)
    assert reply["echo"] == "later"
    assert worker.receive(0.0, 1 << 10) is None
    assert worker.is_alive
