"""`tenon load` over a real server: what it prints, writes and returns."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tenon.base.errors import ConfigError, ResourceError
from tenon.cli import load as job
from tenon.workloads import report, trace
from tenon.workloads.load import ServerModel
from tenon.workloads.trace import Segment, Trace, TraceRequest
from tests.server.conftest import Running, free_port, hash_server, wait_for

ALONE = """
import argparse, sys
from tenon.cli import load
parser = argparse.ArgumentParser()
load.add_arguments(parser)
sys.exit(load.run(parser.parse_args(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """``tenon serve`` with the hash executor."""
    yield from hash_server(tmp_path_factory)


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """A trace of eight requests in two classes."""
    requests = [
        TraceRequest(f"r{i}", 0.02 * i, (Segment(i % 2 + 1, 20),), 6, slo_class=("chat", "code")[i % 2])
        for i in range(8)
    ]
    trace.save(Trace.make("eight", "test", requests), tmp_path / "trace.jsonl")
    return tmp_path / "trace.jsonl"


def load(path: Path, url: str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    return job.run(parser.parse_args([str(path), "--url", url, *words]))


def test_a_load_is_reported_printed_and_drawn(
    server: Running, traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = [f"--{name}={tmp_path / name}" for name in ("json", "plot", "outcomes")]
    slos = ["--slo", "chat:ttft=60,tpot=60", "--slo", "e2e=60s"]
    assert load(traced, server.url + "/v1", "--ignore-eos", *slos, *written) == 0
    got = report.load(tmp_path / "json")
    assert (got.overall.n, got.overall.n_answered, got.overall.output_tokens) == (8, 8, 48)
    assert [group.slo_class for group in got.classes] == ["chat", "code"]
    assert got.overall.attainment is not None
    assert got.overall.attainment.met == 1.0
    assert (got.about["model"], got.about["prompts"], got.about["ignore_eos"]) == ("tiny", "tokens", True)
    lines = (tmp_path / "outcomes").read_bytes().splitlines()
    assert sorted(msgspec.json.decode(line, type=report.Outcome).id for line in lines) == [f"r{i}" for i in range(8)]
    assert ET.fromstring((tmp_path / "plot").read_bytes()).tag.endswith("svg")  # noqa: S314  our own bytes
    said = capsys.readouterr().out
    assert "eight at http://127.0.0.1" in said
    assert "TTFT" in said
    assert "goodput" in said


def test_text_is_sent_where_the_vocabulary_is_not_wanted(server: Running, traced: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    words = ("--endpoint", "chat", "--limit", "3", "--warmup", "1", "--rate-scale", "2", "--body", '{"temperature": 0}')
    assert load(traced, server.url + "/v1", *words, "--json", str(out)) == 0
    got = report.load(out)
    assert got.overall.n_answered == 2
    expected = {"prompts": "text", "endpoint": "chat", "limit": 3, "warmup": 1, "rate_scale": 2.0}
    assert got.about | expected | {"body": {"temperature": 0}} == got.about


def test_classes_are_sent_where_that_is_asked_for(server: Running, traced: Path, tmp_path: Path) -> None:
    """This server knows none, and says so of each."""
    path = tmp_path / "outcomes.jsonl"
    assert load(traced, server.url + "/v1", "--send-classes", f"--outcomes={path}") == 1
    outcomes = [msgspec.json.decode(line, type=report.Outcome) for line in path.read_bytes().splitlines()]
    assert len(outcomes) == 8
    assert all("slo.class" in one.error and one.slo_class in one.error for one in outcomes)


def test_status_1_when_every_request_failed(
    server: Running, traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(traced, server.url + "/v1", "--model", "other", "--json", str(tmp_path / "r.json")) == 1
    assert report.load(tmp_path / "r.json").overall.errors == {"http 404": 8}
    assert "failed 8 x http 404" in capsys.readouterr().out


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Running,
    traced: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(job.KEY_VARIABLE, "secret-from-environment")
    (tmp_path / "key").write_text("secret-from-file\n")
    out = ("--json", str(tmp_path / "r.json"), "--outcomes", str(tmp_path / "o.jsonl"))
    assert load(traced, server.url + "/v1", "--api-key-file", str(tmp_path / "key"), *out) == 0
    assert load(traced, server.url + "/v1", *out) == 0
    told = capsys.readouterr().out + (tmp_path / "r.json").read_text() + (tmp_path / "o.jsonl").read_text()
    assert "secret" not in told


def test_ctrl_c_reports_what_ran(server: Running, tmp_path: Path) -> None:
    requests = [TraceRequest(f"r{i}", 0.0, (Segment(1, 5),), 3) for i in range(3)]
    requests.append(TraceRequest("much later", 1e6, (Segment(1, 5),), 3))
    trace.save(Trace.make("long", "test", requests), tmp_path / "t.jsonl")
    words = [str(tmp_path / "t.jsonl"), "--url", server.url + "/v1", "--json", str(tmp_path / "r.json")]
    outcomes = tmp_path / "o.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, *words, "--outcomes", str(outcomes)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        wait_for(lambda: outcomes.exists() and len(outcomes.read_bytes().splitlines()) == 3)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert "stopped before its end: 1 of 4 requests were not sent" in " ".join(said.split())
    assert report.load(tmp_path / "r.json").overall.n_answered == 3


def test_nobody_listening_is_one_sentence(traced: Path) -> None:
    with pytest.raises(ResourceError, match="no server answers at"):
        load(traced, f"http://127.0.0.1:{free_port()}/v1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slo", "ttft=x"], "an SLO is written"),
        (["--slo", "batch:ttft=1"], "an SLO names the class 'batch'; this trace's classes: chat, code"),
        (["--body", "[1]"], "--body must be a JSON object"),
        (["--url", "localhost:8000"], "a server is named by a URL like"),
        (["--silence-s", "0"], "silence_s must be above 0"),
        (["--api-key-file", "none"], "cannot read the API key from none: FileNotFoundError"),
        (["--vocab-size", "-1"], "--vocab-size must be at least 16"),
        (["--vocab-size", "8"], "vocab_size must be at least 16, got 8"),
        (["--endpoint", "chat", "--prompts", "tokens", "--vocab-size", "256"], "a chat takes texts"),
        (["--rate-scale", "0"], "rate_scale must be above 0"),
        (["--limit", "2", "--warmup", "2"], "none is left to count"),
    ],
)
def test_wrong_usage_is_named(server: Running, traced: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(traced, server.url + "/v1", *words)


@pytest.mark.parametrize(
    ("words", "told", "sent"),
    [
        ([], 4096, 4096),
        ([], 0, 0),
        (["--vocab-size", "300"], 4096, 300),
        (["--prompts", "text"], 4096, 0),
        (["--endpoint", "chat"], 4096, 0),
        (["--feed-answers"], 4096, 0),
        (["--prompts", "tokens"], 4096, 4096),
        (["--prompts", "tokens", "--endpoint", "chat"], 4096, 4096),
    ],
)
def test_token_ids_are_sent_where_they_can_be(words: list[str], told: int, sent: int) -> None:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    assert job._vocab_size(parser.parse_args(["t", *words]), ServerModel("m", told)) == sent


def test_token_ids_need_a_vocabulary() -> None:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    with pytest.raises(ConfigError, match="token prompts need the model's vocabulary"):
        job._vocab_size(parser.parse_args(["t", "--prompts", "tokens"]), ServerModel("m", 0))


def test_a_damaged_trace_is_named_before_anything_is_sent(traced: Path) -> None:
    traced.write_text(traced.read_text().replace('"n_output":6', '"n_output":-6', 1))
    with pytest.raises(ConfigError, match="line 2: n_output must be at least 1, got -6"):
        load(traced, "http://127.0.0.1:1/v1")


def test_outcomes_that_cannot_be_written_are_told(server: Running, traced: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        load(traced, server.url + "/v1", "--outcomes", str(tmp_path / "file" / "o.jsonl"))


def test_the_job_needs_no_torch() -> None:
    program = "import sys, tenon.cli.load; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
