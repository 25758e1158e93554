"""`tenon workload` from the shell's side: list, make, describe, and its one-sentence errors."""

import argparse
import json
from pathlib import Path

import pytest

from tenon.base.errors import ConfigError
from tenon.cli import workload
from tenon.workloads import trace


def tenon_workload(*words: object) -> int:
    parser = argparse.ArgumentParser()
    workload.add_arguments(parser)
    return workload.run(parser.parse_args([str(word) for word in words]))


def test_list_names_every_family_and_one_shows_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert tenon_workload("list") == 0
    assert "mooncake-conversation" in capsys.readouterr().out
    assert tenon_workload("list", "adaserve") == 0
    said = capsys.readouterr().out
    assert "slo_coding_tpot_s" in said
    assert "cited" in said


def test_make_writes_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        assert tenon_workload("make", "adaserve", "-o", path, "--seed", seed, "--requests", 30, "--rate", 3) == 0
    one, same, other = (path.read_bytes() for path in paths)
    assert one == same != other
    assert len(trace.load(paths[0]).requests) == 30


def test_set_reaches_the_generator(tmp_path: Path) -> None:
    words = ("--set", "dispersion=high", "--set", "turns=2", "--duration", 500)
    assert tenon_workload("make", "loogle", "-o", tmp_path / "t", *words) == 0
    made = trace.load(tmp_path / "t")
    assert made.header.parameters == {"seed": 0, "duration_s": 500.0, "dispersion": "high", "turns": 2}
    assert max(r.turn for r in made.requests) <= 1


def test_describe_prints_tables_or_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        tenon_workload("make", "mooncake-conversation", "-o", tmp_path / name, "--seed", seed, "--requests", 300)
    capsys.readouterr()
    assert tenon_workload("describe", tmp_path / "a", "--plot", tmp_path / "a.svg") == 0
    said = capsys.readouterr().out
    assert "ideal hit ratio" in said
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert tenon_workload("describe", tmp_path / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 300
    assert tenon_workload("describe", tmp_path / "a", tmp_path / "b", "--json", "--full-blocks") == 0
    both = json.loads(capsys.readouterr().out)
    assert len(both["traces"]) == 2
    assert 0 < both["difference"]["ks"]["input"] < 0.2
    assert tenon_workload("describe", tmp_path / "a", tmp_path / "b", "--block-tokens", 64) == 0
    assert "points" in capsys.readouterr().out


def test_public_formats_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    for form in ("auto", "azure"):
        assert tenon_workload("describe", path, "--format", form, "--json") == 0
        assert json.loads(capsys.readouterr().out)["input"]["mean"] == 374


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("make", "none", "-o", "x"), "there is no workload 'none'"),
        (("list", "none"), "there is no workload 'none'"),
        (("make", "lmsys", "-o", "x", "--set", "turns"), "--set takes name=value, got 'turns'"),
        (("make", "lmsys", "-o", "x", "--set", "turns=many"), "turns must be a number, got 'many'"),
        (("describe", "/nowhere/t.jsonl"), "cannot read /nowhere/t.jsonl"),
    ],
)
def test_errors_are_one_sentence(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        tenon_workload(*words)
    assert "\n" not in str(raised.value)
