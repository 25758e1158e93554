"""`tenon bench` from the shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tenon.base import result
from tenon.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the startup bench and nothing committed."""
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "startup.py", tmp_path / "bench")
    return tmp_path


def tenon(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tenon", *words], cwd=folder, capture_output=True, text=True)


def test_a_quick_run_writes_a_result_that_loads_and_list_shows_none_committed(checkout: Path) -> None:
    done = tenon(checkout, "bench", "run", "startup", "--quick", "--threads", "1")
    assert done.returncode in (0, 1), done.stderr  # a busy machine may make the copies differ
    path = checkout / "runs" / "bench-startup-quick" / "result.json"
    got = result.load(path)
    assert got.settings == {"quick": True, "seed": 0, "threads": 1}
    assert tenon(checkout, "bench", "compare", str(path), str(path)).returncode == 0
    assert "no committed result" in tenon(checkout, "bench", "list").stdout
    (checkout / "bench" / "results").mkdir()
    shutil.copy(path, checkout / "bench" / "results")
    (checkout / "bench" / "results" / "result.json").rename(checkout / "bench" / "results" / "startup.json")
    assert tenon(checkout, "bench", "verify", "startup").returncode == int(
        not (got.counts and all(check.passed for check in got.checks))
    )


def test_an_error_is_one_sentence_and_status_2(checkout: Path) -> None:
    done = tenon(checkout, "bench", "verify", "startup")
    assert done.returncode == 2
    assert done.stderr.startswith("tenon: cannot read bench/results/startup.json")
    assert done.stderr.count("\n") == 1


def test_help_names_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "serve" in said
    assert "bench" in said


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "JOB" in capsys.readouterr().err


def test_hyphens_in_a_name_are_underscores(checkout: Path) -> None:
    (checkout / "bench" / "startup.py").rename(checkout / "bench" / "start_up.py")
    done = tenon(checkout, "bench", "verify", "start-up")
    assert done.returncode == 2
    assert done.stderr.startswith("tenon: cannot read bench/results/start_up.json")
