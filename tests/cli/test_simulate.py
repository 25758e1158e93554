"""`tenon simulate` from arguments to reports and files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tenon.base.errors import ConfigError
from tenon.base.records import read_records
from tenon.cli import simulate
from tenon.workloads.trace import Segment, Trace, TraceRequest, save


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    requests = (
        TraceRequest(f"r{i}", i / 5, (Segment(1, 300), Segment(10 + i, 50)), 20 + i, slo_class=("fast", "slow")[i % 2])
        for i in range(12)
    )
    save(Trace.make("twelve", "this test", requests, slo={"fast": {"ttft_s": 10.0}}), tmp_path / "trace.jsonl")
    return tmp_path / "trace.jsonl"


def run(tmp_path: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    base = ["--model", "Llama-3.1-8B", "--device", "H100", "--runs", str(tmp_path / "runs")]
    return simulate.run(parser.parse_args([*base, *words]))


def test_the_summary_says_that_it_is_simulated_and_by_what(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(tmp_path, "--trace", str(trace)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "simulated: twelve, Llama-3.1-8B on H100" in said
    assert "no model ran" in said
    assert "TTFT" in said
    assert "SLO met" in said


def test_chunks_are_settings_like_others(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--trace", str(trace), "--json", "--config", "chunk=adaptive")
    assert run(tmp_path, *words, "--config", "tpot_ms=12.5", "--config", "min_chunk_tokens=32") == 0
    about = json.loads(capsys.readouterr().out)["about"]
    assert (about["chunk"], about["tpot_ms"], about["min_chunk_tokens"]) == ("adaptive", 12.5, 32)
    with pytest.raises(ConfigError, match="tpot_ms"):
        run(tmp_path, *words)


def test_json_is_the_report_and_the_same_each_time(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for _ in range(2):
        assert run(tmp_path, "--trace", str(trace), "--json", "--config", "max_sequences=4", "--slo", "tpot=1") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    report = json.loads(texts[0])
    assert report["about"]["simulated"] is True
    assert report["about"]["device"] == "H100"
    assert report["about"]["max_sequences"] == 4
    assert report["overall"]["n_answered"] == 12
    assert report["overall"]["attainment"]["met"] == 1.0
    assert report["overall"]["output_tokens"] == sum(20 + i for i in range(12))


def test_events_and_pictures_are_written(tmp_path: Path, trace: Path) -> None:
    assert run(tmp_path, "--trace", str(trace), "--requests", "6", "--plot", str(tmp_path / "plots")) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    kinds = [record["kind"] for record in read_records(folder)]
    assert kinds[:2] == ["run", "simulated"]
    assert kinds.count("finished") == 6
    for name in ("report.svg", "timeline.svg"):
        assert ElementTree.parse(tmp_path / "plots" / name).getroot().tag.endswith("svg")  # noqa: S314
    assert json.loads((tmp_path / "plots" / "timeline.json").read_bytes())["traceEvents"]


def test_a_workloads_name_is_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trace", "sharegpt", "--requests", "5", "--seed", "3", "--json"]
    assert run(tmp_path, *words) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["n"] == 5


def test_guesses_are_simulated_and_said_to_be_made_up(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--trace", str(trace), "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    words = ["--draft", "Llama-3.2-1B", "--config", "speculative_policy=slack", "--slo", "fast:tpot=1ms"]
    assert run(tmp_path, "--trace", str(trace), "--json", *words) == 0
    guessed = json.loads(capsys.readouterr().out)
    assert "how right a draft is, is made up" in guessed["notes"][1]
    assert guessed["about"]["steps"] < plain["about"]["steps"]
    assert guessed["overall"]["tpot"]["mean"] < plain["overall"]["tpot"]["mean"]
    told = [r["guesses"] for one in (tmp_path / "runs").iterdir() for r in read_records(one) if r.get("guesses")]
    assert max(guesses["trees"] for guesses in told) > 10


def test_a_server_s_record_is_served_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "events.jsonl"
    lines = [{"kind": "run", "at_s": 1.0, "version": 1}]
    for i in range(4):
        name = {"request_id": f"r{i}"}
        lines.append({"kind": "started", "at_s": 2.0 + i, "n_prompt": 20, "n": 1} | name)
        slo = {"class": "chat", "ttft_ms": 1000.0, "tpot_ms": 50.0}
        end = {"kind": "finished", "at_s": 3.0 + i, "reason": "stop", "n_output": 9, "e2e_s": 1.0, "slo": slo}
        lines.append(end | name)
    record.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    assert run(tmp_path, "--trace", str(record), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overall"]["n_answered"] == 4
    assert report["overall"]["output_tokens"] == 36
    assert [one["slo_class"] for one in report["classes"]] == ["chat"]
    assert report["overall"]["attainment"]["met"] == 1.0


def test_more_devices_are_faster(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans = []
    for n in ("1", "2"):
        run(tmp_path, "--trace", str(trace), "--json", "--devices", n)
        spans.append(json.loads(capsys.readouterr().out)["overall"]["tpot"]["mean"])
    assert spans[1] < spans[0]


def test_nothing_answered_is_status_1(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--trace", str(trace), "--config", "max_model_len=50") == 1
    assert "http 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "H1000"], "no device 'H1000'.*H100"),
        (["--model", "Llama-3.1-8"], "known shape 'Llama-3.1-8'; did you mean Llama-3.1-8B"),
        (["--trace", "nothing"], "no file and no workload 'nothing'"),
        (["--config", "max_seqs=4"], "--config takes K=V with K one of dtype"),
        (["--config", "device=cpu"], "--config takes K=V"),
        (["--config", "max_sequences=many"], "--config: Expected `int`.*max_sequences"),
        (["--config", "max_sequences=0"], "max_sequences must be at least 1, got 0"),
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--text-ms", "-1"], "--text-ms must be at least 0, got -1"),
        (["--rate", "3"], "--rate is for traces made by name"),
        (["--slo", "quick:ttft=1"], "the class 'quick'; this trace's classes: fast, slow"),
        (["--model", "Llama-3-70B"], "the weights take 141.1 GB"),
        (["--draft", "Llama-3.2-2B"], "known shape 'Llama-3.2-2B'; did you mean Llama-3.2-1B"),
        (["--config", "speculative_policy=luck"], "speculative_policy must be one of 'pays'"),
        (["--device", "V100"], "V100 has no arithmetic in bfloat16"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, trace: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        run(tmp_path, "--trace", str(trace), *words)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_a_trace_that_is_none_names_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"kind":"trace","version":1,"name":"n","source":"s"}\n{"id":"a","arrival_s":-1}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl line 2"):
        run(tmp_path, "--trace", str(bad))
