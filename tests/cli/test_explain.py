"""``tenon explain``: what it finds in a server's records, and says of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import ConfigError
from tenon.base.records import RecordWriter
from tenon.cli import explain as job
from tenon.server.outcome import PARTS
from tests.server.conftest import Running, start, write_model

LEDGER: dict[str, Any] = dict.fromkeys(PARTS, 0.0) | {
    "queue_s": 0.25, "decode_s": 1.5, "behind_s": 0.25, "gained_s": 0.1, "index": 0, "ahead": 4,
    "behind": [{"request_id": "other/0", "seconds": 0.2}],
}  # fmt: skip
CACHE = {
    "cached_tokens": 48, "holes": 1, "n_misses": 3,
    "misses": [
        {"start": 0, "end": 16, "kind": "evicted", "cost": 1.0, "policy": "lru", "evicted_s": 1.0, "until_s": 2.0},
        {"start": 64, "end": 96, "kind": "new", "cost": 1.0, "differs_at": 70},
    ],
}  # fmt: skip
SLO = {
    "class": "chat", "ttft_ms": 500.0, "tpot_ms": None, "strict": False, "met": False, "downgraded": True,
    "forecast": {"ttft_ms": 700.0, "tpot_ms": 10.0, "hit_tokens": 48, "confidence": None},
    "actual": {"ttft_ms": 800.0, "tpot_ms": 12.0},
}  # fmt: skip
FINISHED: dict[str, Any] = {
    "request_id": "abc-01234567/0", "reason": "stop", "n_output": 20, "e2e_s": 2.0, "cache": CACHE, "slo": SLO,
    "ledger": LEDGER,
}  # fmt: skip


def record(runs: Path, name: str, *records: tuple[str, dict[str, Any]], at_s: float = 1.0) -> None:
    with RecordWriter(runs / name) as writer:
        for kind, fields in records:
            writer.write(kind, **fields)
    os.utime(writer.path, (at_s, at_s))


def explained(runs: Path, request_id: str, capsys: pytest.CaptureFixture[str]) -> str:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    assert job.run(parser.parse_args([request_id, "--runs", str(runs)])) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("given", ["abc-01234567/0", "abc-01234567", "abc", "chatcmpl-abc-01234567"])
def test_all_that_is_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    started = {"request_id": "abc-01234567/0", "n_prompt": 100, "n": 1}
    record(tmp_path, "serve-1", ("finished", FINISHED | {"request_id": "abcd-01234567/0"}))
    record(tmp_path, "serve-2", ("started", started), ("finished", FINISHED), at_s=0.5)
    said = explained(tmp_path, given, capsys)
    for part in (
        "abc-01234567/0: ended by stop, 20 tokens, 2 s, 100 tokens of prompt", "waiting for its turn 250 ms 12.5%",
        "decoding 1.5 s 75.0%", "in all 2 s 100.0%", "was not kept (class chat, served as well as could be",
        "TTFT: first token within 500 ms, expected 700 ms, came 800 ms", "TPOT: nothing promised, expected 10 ms",
        "4 others ran or waited", "behind the prompts of other/0 200 ms", "guesses gained 100 ms",
        "had 48 tokens of its prompt, with 1 holes", "0 to 16: evicted by lru", "64 to 96: new, parting",
        "1 other runs",
    ):  # fmt: skip
        assert part in said
    assert "preempted" not in said


def test_the_newest_run_counts_and_a_late_ledger_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = FINISHED | {"ledger": None, "cache": None, "slo": None}
    late = {"request_id": FINISHED["request_id"], "ledger": LEDGER}
    record(tmp_path, "serve-9", ("finished", FINISHED | {"reason": "length"}), at_s=1.0)
    record(tmp_path, "serve-1", ("finished", bare), ("ledger", late), at_s=2.0)
    said = explained(tmp_path, "abc", capsys)
    assert "ended by stop" in said
    assert "decoding 1.5 s" in said
    assert "promised" not in said
    record(tmp_path, "serve-2", ("finished", bare), at_s=3.0)
    assert "the engine has not said" in explained(tmp_path, "abc", capsys)


def test_who_is_not_known_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'abc' is not known: looked into no run under"):
        job.find(tmp_path, "abc")
    record(tmp_path, "serve-1", ("started", {"request_id": "abc/0", "n_prompt": 1, "n": 1}))
    with pytest.raises(ConfigError, match="'abd' is not known: looked into 1 runs under"):
        job.find(tmp_path, "abd")
    with pytest.raises(ConfigError, match=r"has begun in .*serve-1 and has not ended"):
        job.find(tmp_path, "abc")


@pytest.fixture
def recording(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENON_STATE", str(tmp_path_factory.mktemp("state")))
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        model = write_model(tmp_path_factory.mktemp("tiny"))
        running = start(model, "--record", str(tmp_path), "--step-ms", "5", "--slo", "ttft=60,tpot=60")
    yield running
    assert running.stop() == 0
    running.close()


def test_a_server_s_own_records_explain_it(
    recording: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = recording.complete(prompt=[5] * 40, max_tokens=10, ignore_eos=True)
    said = explained(tmp_path, answer["id"], capsys)
    assert "10 tokens" in said
    assert "computing its prompt" in said
    assert "what it was promised was kept" in said
    assert "missed 0 to 32: new" in said
