"""The line to the engine delays, shreds, stalls, breaks: answers are those of a good one, or one sentence is said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, WITH_LIMITS, Running, free_port, launch, wait_for
from tests.server.fault_proxy import Fault, python_behind
from tests.server.test_lifecycle import assert_conserved
from tests.server.test_survival import ASKED, ready, told

OTHER_PYTHON = WITH_LIMITS.replace("given = ", "given = sys.argv[1]; sys.executable = sys.argv[2]\ngiven = ")


@contextlib.contextmanager
def behind(
    faults: dict[int, Fault], model: Path, folder: Path, *, wait_ready: bool = True, stall_s: float = 10.0
) -> Iterator[Running]:
    """A server whose engines, by their epoch, have these lines."""
    program, named = python_behind(faults, folder)
    port = free_port()
    given = {"model": str(model), "port": port, "limits": {"replays": 30, "stall_s": stall_s}}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENON_FAULTS", str(named))
        words = ["-c", OTHER_PYTHON, json.dumps(given), str(program)]
        running = launch(words, port, "tiny", wait_ready=wait_ready)
    try:
        yield running
    finally:
        running.close()


def some(server: Running) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda asked: told(server, asked, 200, streamed=True), ASKED[:4]))


def patient(server: Running, asked: dict[str, Any], max_tokens: int) -> Any:
    """What is told a client that comes again when it was told to."""
    while True:
        wait_for(lambda: ready(server))
        try:
            return told(server, asked, max_tokens, streamed=True)
        except AssertionError as error:
            if "engine_restarting" not in str(error):
                raise


def restarts(server: Running) -> float:
    return server.metrics()["tenon_engine_restarts_total"]


def assert_sound(server: Running, n_restarts: int) -> None:
    metrics = server.metrics()
    assert metrics["tenon_engine_restarts_total"] == n_restarts
    assert metrics["tenon_requests_running"] == 0
    assert metrics['tenon_requests_finished_total{reason="error"}'] == 0
    assert_conserved(metrics)
    wait_for(lambda: server.metrics()["tenon_kv_blocks_used"] == 0)
    assert server.stop() == 0


def test_broken_lines_are_replaced_and_nobody_notices(server: Running, model_folder: Path, tmp_path: Path) -> None:
    faults = {
        1: Fault("cut", at=5_000, delay_s=0.001, shred=True),
        2: Fault("garbage", at=10_000),
        3: Fault("reset", at=10_000),
        4: Fault(delay_s=0.001),
    }
    undisturbed = some(server)
    with behind(faults, model_folder, tmp_path) as other, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(some, other)
        wait_for(lambda: restarts(other) == 2 and ready(other))
        while restarts(other) == 2:  # what the server says next stays unread when the line is reset
            other.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert whole.result(PATIENCE_S) == undisturbed
        assert_sound(other, 3)


@pytest.mark.slow
def test_a_line_that_stalls_is_told_and_goes_on(server: Running, model_folder: Path, tmp_path: Path) -> None:
    """The engine's pulse says that it lives, so it is not replaced; but no work gets done."""
    undisturbed = told(server, {"seed": 1}, 400, streamed=True)
    faults = {1: Fault("stall", at=15_000, stall_s=5.0)}
    with behind(faults, model_folder, tmp_path, stall_s=2.0) as other, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(told, other, {"seed": 1}, 400, streamed=True)
        wait_for(lambda: not ready(other))
        assert "no progress" in httpx.get(other.url + "/readyz", timeout=PATIENCE_S).json()["reason"]
        assert httpx.get(other.url + "/livez", timeout=PATIENCE_S).status_code == 200
        assert stream.result(PATIENCE_S) == undisturbed
        wait_for(lambda: ready(other))
        assert_sound(other, 0)


def test_a_line_that_breaks_before_anything_was_served(model_folder: Path, tmp_path: Path) -> None:
    with behind({1: Fault("garbage", at=10)}, model_folder, tmp_path, wait_ready=False) as other:
        _, said = other.process.communicate(timeout=PATIENCE_S)
        assert other.process.returncode == 1
        assert "Traceback" not in said
        assert "the engine sent" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_of_break_at_many_places(server: Running, model_folder: Path, tmp_path: Path) -> None:
    """Byte by byte through a frame's head and the first of its body, and where most is in flight."""
    undisturbed = [told(server, asked, 300, streamed=True) for asked in ASKED]
    places = [*range(9), 100, 1000, 30_000]
    for end in ("cut", "garbage", "half"):
        faults = {i + 2: Fault(end, at=at + 2000) for i, at in enumerate(places[:: 4 if end == "half" else 1])}
        faults[1] = Fault(end, at=40_000)
        folder = tmp_path / end
        folder.mkdir()
        with behind(faults, model_folder, folder) as other, ThreadPoolExecutor(len(ASKED)) as pool:
            while restarts(other) < len(faults):
                assert list(pool.map(lambda asked: patient(other, asked, 300), ASKED)) == undisturbed
            assert_sound(other, len(faults))
