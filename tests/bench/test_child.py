"""A contender's process answers, or its failure is told in one sentence."""

from pathlib import Path

import pytest

from tenon.base.errors import ProtocolError
from tenon.base.result import ContenderEntry
from tenon.bench.child import Child, ContenderError

ROOT = Path(__file__).parents[2]


def child(tmp_path: Path, kind: str, **options: object) -> Child:
    entry = ContenderEntry(f"tests.bench.doubles:{kind}", dict(options))
    return Child("c", entry, root=ROOT, threads=3, log=tmp_path / "log")


def test_a_contender_samples_and_what_it_prints_is_logged(tmp_path: Path) -> None:
    with child(tmp_path, "Known", factor=2.0) as one:
        one.setup({"base_s": 10.0}, limit_s=30)
        assert one.sample(limit_s=30)["seconds"] == pytest.approx(20.2)
    assert (tmp_path / "log").read_text() == "this line is no answer\n"


def test_contenders_are_processes_of_their_own_with_the_threads_asked_for(tmp_path: Path) -> None:
    with child(tmp_path, "Environment") as a, child(tmp_path, "Environment") as b:
        first, second = a.sample(limit_s=30), b.sample(limit_s=30)
    assert first["pid"] != second["pid"]
    assert first["threads"] == second["threads"] == 3.0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "failed at sample: RuntimeError: it broke"),
        ("exit", "ended with status 3"),
        ("hang", "longer than 1 s"),
    ],
)
def test_a_failure_is_told(tmp_path: Path, how: str, said: str) -> None:
    with child(tmp_path, "Failing", how=how) as one:
        one.setup({}, limit_s=30)
        one.sample(limit_s=30)
        with pytest.raises(ContenderError, match=said):
            one.sample(limit_s=1 if how == "hang" else 30)
        if how == "hang":
            one._process.kill()


def test_metrics_are_numbers(tmp_path: Path) -> None:
    with child(tmp_path, "Failing", how="words") as one:
        one.setup({}, limit_s=30)
        one.sample(limit_s=30)
        with pytest.raises(ProtocolError, match="many"):
            one.sample(limit_s=30)


@pytest.mark.parametrize(
    ("entry", "said"), [("nowhere:C", "nowhere"), ("tests.bench.doubles:No", "no class No"), ("plain", "module:Class")]
)
def test_an_entry_that_leads_nowhere_is_told(tmp_path: Path, entry: str, said: str) -> None:
    one = Child("c", ContenderEntry(entry, {}), root=ROOT, threads=1, log=tmp_path / "log")
    with one, pytest.raises(ContenderError, match=said):
        one.setup({}, limit_s=30)
