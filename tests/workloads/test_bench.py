"""The bench that holds made traces to their originals: what it measures, and that it can fail."""

from pathlib import Path

import pytest

from bench import workloads
from tenon.base import machine, result
from tenon.base.result import Result
from tenon.bench import claim, stats
from tenon.workloads.parameters import families

ROOT = Path(__file__).parents[2]
NAME = "mooncake-conversation"


def test_every_family_with_figures_is_a_cell_and_says_whether_its_file_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENON_TRACES", str(tmp_path))
    (tmp_path / "mooncake_conversation.jsonl").write_text("{}\n")
    cells = {cell.name: cell for cell in claim.load(ROOT / "bench", "workloads").cells(False)}
    assert set(cells) == {name for name, family in families().items() if family.figures}
    assert "sha256" in cells["mooncake-conversation"].params["file"]
    assert cells["mooncake-conversation"].contenders == ("made", "cited", "file")
    assert cells["azure-2023-code"].params["file"] == "absent: $TENON_TRACES/azure_llm_2023_code.csv"
    assert cells["azure-2023-code"].contenders == ("made", "cited")


def test_a_sample_has_every_figure_and_the_next_seed_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENON_TRACES", raising=False)
    cell = {"family": "adaserve", "asked": {"requests": 300}}
    made, cited = workloads.Made(), workloads.Cited()
    made.setup(cell)
    cited.setup(cell)
    first, second, figures = made.sample(), made.sample(), cited.sample()
    assert set(first) == set(figures) == set(families()["adaserve"].figures)
    assert first != second
    assert figures["class_coding"] == 0.6
    made.close()
    cited.close()


def judged(made: dict[str, list[float]], cited: dict[str, float]) -> Result:
    series = [stats.series(NAME, "made", name, values) for name, values in made.items()]
    series += [stats.series(NAME, "cited", name, [value] * 3) for name, value in cited.items()]
    empty: dict[str, object] = {"ratios": (), "a_a": (), "limits": (), "checks": (), "counts": True, "notes": ()}
    return Result(
        version=result.VERSION, name="workloads", title="", created="", commit="", machine=machine.describe(),
        settings={}, cells={NAME: {}}, contenders=workloads.CONTENDERS, series=tuple(series), **empty,  # type: ignore[arg-type]
    )  # fmt: skip


def test_checks_fail_where_figures_are_off() -> None:
    made = {
        "input_mean": [109.0, 109.0, 109.0], "input_p50": [130.0, 131.0, 132.0], "input_p99": [90.0, 150.0, 160.0],
        "lru_512000": [0.06, 0.06, 0.06], "lru_51200000": [0.3, 0.3, 0.3], "lru_worst_points": [9.0, 9.0, 9.0],
        "follow_gap_s_ks": [0.06, 0.06, 0.06], "block_gap_s_ks_to_file": [0.04, 0.04, 0.04],
        "input_ks_to_file": [0.5, 0.5, 0.5],
    } | {f"lru_curve_{size}": [hit + 0.019] * 3 for size, hit in families()[NAME].curves["lru"].value}  # fmt: skip
    cited = dict.fromkeys(("input_mean", "input_p50", "input_p99"), 100.0) | {"lru_512000": 0.05, "lru_51200000": 0.33}
    checks = {check.name: check.passed for check in workloads.checks(judged(made, cited))}
    assert checks == {
        "mooncake-conversation: input_mean, relative error": True,
        "mooncake-conversation: input_p50, relative error": False,
        "mooncake-conversation: input_p99, relative error": True,
        "mooncake-conversation: lru_512000, points off": True,
        "mooncake-conversation: lru_51200000, points off": False,
        "mooncake-conversation: LRU curve, points off at worst": True,
        "mooncake-conversation: follow_gap_s, KS to the cited": False,
        "mooncake-conversation: block_gap_s, KS to the file": True,
    }
