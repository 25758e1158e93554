"""A Result on disk is refused unless every derived figure follows from its samples."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenon.base import files, machine, result
from tenon.base.errors import ConfigError
from tenon.base.result import ContenderEntry, Limit, Ratio, Result, Series


@pytest.fixture
def good() -> Result:
    entry = ContenderEntry("m:C", {})
    return Result(
        version=result.VERSION,
        name="demo",
        title="a demonstration",
        created="2026-01-01T00:00:00+00:00",
        commit="",
        machine=machine.describe(),
        settings={"quick": False, "seed": 0, "threads": 1},
        cells={"b1": {"batch": 1}},
        contenders={"ours": entry, "theirs": entry},
        series=(
            Series("b1", "ours", "seconds", (1.0, 3.0, 2.0), 2.0, 1.0, 3.0),
            Series("b1", "theirs", "seconds", (2.0, 3.0, 8.0), 3.0, 2.0, 8.0),
        ),
        ratios=(Ratio("b1", "seconds", "ours", "theirs", 0.5, 0.25, 1.0),),
        a_a=(),
        limits=(Limit("read_1_threads_Bps", 1e10),),
        checks=(result.at_most("quick enough", 2.0, 2.5),),
        counts=True,
        notes=(),
    )


def test_a_result_is_read_back_equal(good: Result, tmp_path: Path) -> None:
    result.save(good, tmp_path / "demo.json")
    assert result.load(tmp_path / "demo.json") == good


def test_lookups(good: Result) -> None:
    assert good.median("b1", "ours", "seconds") == 2.0
    assert good.ratio("b1", "ours", "theirs", "seconds") == 0.5
    assert good.limit("read_1_threads_Bps") == 1e10


def test_what_is_not_there_is_named_with_what_is(good: Result) -> None:
    with pytest.raises(ConfigError, match="has no b2/ours/seconds; it has b1/ours/seconds"):
        good.median("b2", "ours", "seconds")
    with pytest.raises(ConfigError, match="read_1_threads_Bps"):
        good.limit("gemm")


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (result.at_most("x", 2.0, 2.0), True),
        (result.at_most("x", 2.1, 2.0), False),
        (result.at_least("x", 2.0, 2.0), True),
        (result.at_least("x", 1.9, 2.0), False),
        (result.at_most("x", float("nan"), 2.0), False),
        (result.at_least("x", float("nan"), 2.0), False),
    ],
)
def test_checks(check: result.Check, passed: bool) -> None:
    assert check.passed is passed


def edited(good: Result, path: Path, *keys: Any, value: Any) -> Path:
    """The file of ``good`` with one value inside exchanged."""
    tree = msgspec.to_builtins(good, builtin_types=())
    inside = tree = msgspec.json.decode(msgspec.json.encode(tree))
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    files.write_json(path, tree)
    return path


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("version",), 2, "version is 2"),
        (("series", 0, "median"), 1.5, "its samples give 2.0"),
        (("series", 0, "samples"), [], "finite samples"),
        (("series", 0, "low"), 2.5, "outside its interval"),
        (("series", 1, "cell"), "b9", "not in cells"),
        (("series", 1, "contender"), "who", "not in contenders"),
        (("ratios", 0, "median"), 0.4, "the samples give 0.5"),
        (("ratios", 0, "under"), "who", "has no b1/who/seconds"),
        (("checks", 0, "passed"), False, "says passed=False"),
        (("checks", 0, "direction"), "about", "direction"),
        (("surprise",), 1, "surprise"),
        (("counts",), "yes", "counts"),
    ],
)
def test_a_result_that_does_not_hold_together_is_refused(
    good: Result, tmp_path: Path, keys: tuple[Any, ...], value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        result.load(edited(good, tmp_path / "demo.json", *keys, value=value))
