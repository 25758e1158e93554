"""Benches are found, loaded and refused by name."""

import sys
from pathlib import Path

import pytest

from tenon.base import result
from tenon.base.errors import ConfigError
from tenon.bench import claim
from tenon.cli import bench as bench_job

BENCH = Path(__file__).parents[2] / "bench"

SCRIPT = """
from tenon.base.result import ContenderEntry
TITLE = "a title"
CONTENDERS = {"ours": ContenderEntry("m:C", {})}
BASELINE = "ours"
LIMITS = False
def cells(quick): return []
def checks(result): return []
"""


@pytest.mark.parametrize("name", claim.names(BENCH))
def test_every_bench_of_the_repository_loads_and_names_cells(name: str) -> None:
    bench = claim.load(BENCH, name)
    for quick in (True, False):
        assert bench.cells(quick)


@pytest.mark.parametrize("name", claim.names(BENCH))
def test_every_committed_result_holds_together(name: str) -> None:
    path = bench_job.committed(BENCH, name)
    if path.exists():
        assert result.load(path).name == name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("TITLE", "NAME", "TITLE must be a str"),
        ('BASELINE = "ours"', 'BASELINE = "who"', "BASELINE 'who' is none of ours"),
        ("def cells", "def rows", "cells must be a Callable"),
    ],
)
def test_a_script_that_lacks_a_name_is_told(tmp_path: Path, old: str, new: str, said: str) -> None:
    folder = tmp_path / f"claims_{abs(hash(said))}"
    folder.mkdir()
    (folder / "demo.py").write_text(SCRIPT.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        claim.load(folder, "demo")
    sys.path.remove(str(tmp_path))


def test_an_unknown_bench_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="startup"):
        claim.load(BENCH, "nothing")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="root of a checkout"):
        claim.names(tmp_path / "bench")
