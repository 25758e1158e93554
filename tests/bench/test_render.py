"""Tables and figures of a result."""

import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from tenon.base import machine, result
from tenon.base.errors import ConfigError
from tenon.base.result import ContenderEntry, Result
from tenon.bench import plot, render, stats


def demo(*seconds: float, name: str = "demo") -> Result:
    ours = stats.series("b1", "ours", "seconds", seconds)
    twin = stats.series("b1", "ours (again)", "seconds", seconds)
    theirs = stats.series("b1", "theirs", "seconds", [2 * x for x in seconds])
    entry = ContenderEntry("m:C", {})
    return Result(
        version=result.VERSION,
        name=name,
        title="a demonstration",
        created="2026-01-01T00:00:00+00:00",
        commit="",
        machine=machine.describe(),
        settings={"quick": False, "seed": 0, "threads": 1},
        cells={"b1": {}},
        contenders={"ours": entry, "theirs": entry, "ours (again)": entry},
        series=(ours, theirs, twin),
        ratios=(stats.paired(ours, theirs),),
        a_a=(stats.paired(ours, twin),),
        limits=(result.Limit("read_1_threads_Bps", 1.5e10),),
        checks=(result.at_most("quick", ours.median, 0.001),),
        counts=True,
        notes=("warm",),
    )


def printed(draw: object, *results: Result) -> str:
    console = Console(file=io.StringIO(), width=160)
    draw(*results, console)
    return console.file.getvalue()


def test_a_table_shows_medians_ratios_limits_checks_and_notes() -> None:
    text = printed(render.show, demo(0.002, 0.003, 0.004))
    for word in ("ours", "3 m", "0.500 (0.500 .. 0.500)", "1.000", "15 G", "FAIL quick: 0.003 <= 0.001", "note warm"):
        assert word in text
    assert "(again)" not in text


def test_a_result_that_does_not_count_says_so() -> None:
    assert "does not count" in printed(render.show, replace(demo(1.0), counts=False))


def test_compare_marks_disjoint_intervals() -> None:
    text = printed(render.compare, demo(1.0, 1.1, 1.2), demo(2.0, 2.1, 2.2))
    assert "1.909" in text
    assert "differs" in text
    assert "differs" not in printed(render.compare, demo(1.0, 1.1, 1.2), demo(1.0, 1.15, 1.2))


def test_compare_refuses_two_benches() -> None:
    with pytest.raises(ConfigError, match="two benches, demo and other"):
        printed(render.compare, demo(1.0), demo(1.0, name="other"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.0, "1"), (0.0123, "12.3 m"), (4.56e10, "45.6 G"), (999.0, "999"), (-2e3, "-2 k")]
)
def test_amounts(value: float, text: str) -> None:
    assert render.amount(value) == text


def test_a_figure_is_the_same_svg_each_time() -> None:
    pytest.importorskip("matplotlib")
    first = plot.svg(demo(1.0, 2.0))
    assert first.startswith(b"<?xml")
    assert b"(again)" not in first
    assert first == plot.svg(demo(1.0, 2.0))
