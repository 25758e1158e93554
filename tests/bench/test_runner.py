"""Rounds, pairs, A/A, resumption: with contenders whose times are known."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tenon.base import records, result
from tenon.base.errors import ConfigError, ProtocolError
from tenon.base.result import Check, ContenderEntry, Result
from tenon.bench import runner
from tenon.bench.child import ContenderError
from tenon.bench.claim import Bench, Cell

ROOT = Path(__file__).parents[2]
ENTRY = "tests.bench.doubles:"


class Heard:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.plans: list[runner.Plan] = []
        self.begun: list[tuple[str, list[str]]] = []
        self.done: list[int] = []

    def planned(self, plan: runner.Plan) -> None:
        self.plans.append(plan)

    def kept(self, cell: Cell) -> None:
        self.begun.append((cell.name, []))

    def began(self, cell: Cell, contenders: Sequence[str]) -> None:
        self.begun.append((cell.name, list(contenders)))

    def sampled(self, cell: Cell, done: int, of: int) -> None:
        self.done.append(done)


def bench(cells: list[Cell], **contenders: ContenderEntry) -> Bench:
    def checks(of: Result) -> list[Check]:
        return [
            result.at_least(f"{name}: speedup", of.ratio(name, "theirs", "ours", "seconds"), 2.9) for name in of.cells
        ]

    entries = {
        "ours": ContenderEntry(ENTRY + "Known", {}),
        "theirs": ContenderEntry(ENTRY + "Known", {"factor": 3.0}),
    } | contenders
    return Bench("demo", "a demonstration", entries, "theirs", False, lambda quick: cells, checks)


def setting(tmp_path: Path) -> runner.Setting:
    return runner.Setting(ROOT, tmp_path, threads=1)


def test_a_run_gives_medians_ratios_and_checks(tmp_path: Path) -> None:
    heard = Heard()
    got = runner.run(bench([Cell("one", {"base_s": 2.0}, rounds=3)]), setting(tmp_path), heard)
    assert got.find("one", "ours", "seconds").samples == pytest.approx((2.04, 2.06, 2.08))
    assert got.median("one", "theirs", "seconds") == pytest.approx(6.18)
    assert [(r.over, r.under, round(r.median, 9)) for r in got.ratios] == [("ours", "theirs", round(1 / 3, 9))]
    assert [(r.over, r.under, r.median) for r in got.a_a] == [("ours", "ours (again)", 1.0)]
    assert got.counts
    assert [check.passed for check in got.checks] == [True]
    assert heard.begun == [("one", ["ours", "theirs", "ours (again)"])]
    assert heard.done == list(range(1, 13))
    result.save(got, tmp_path / "demo.json")
    assert result.load(tmp_path / "demo.json") == got


def test_every_round_samples_all_in_an_order_drawn_from_the_seed() -> None:
    names = ["a", "b", "c"]
    rounds = list(runner.order(names, 300, seed=1))
    assert all(sorted(one) == names for one in rounds)
    assert rounds == list(runner.order(names, 300, seed=1))
    assert rounds != list(runner.order(names, 300, seed=2))
    assert all(70 < n < 130 for n in Counter(one[0] for one in rounds).values())


def test_copies_that_differ_make_the_result_not_count(tmp_path: Path) -> None:
    unequal = ContenderEntry(ENTRY + "Unequal", {})
    cells = [Cell("one", {"file": str(tmp_path / "first")}, rounds=2)]
    got = runner.run(bench(cells, ours=unequal), setting(tmp_path), Heard())
    assert not got.counts
    assert "ours against itself differs by 16.7% in seconds" in got.notes[0]


def test_a_run_that_failed_goes_on_after_its_last_whole_cell(tmp_path: Path) -> None:
    good = Cell("good", rounds=2)
    failing = {"bad": ContenderEntry(ENTRY + "Failing", {"how": "raise"})}
    only_known = ("ours", "theirs")
    cells = [Cell("good", rounds=2, contenders=only_known), Cell("bad", rounds=2)]
    with pytest.raises(ContenderError, match="it broke"):
        runner.run(bench(cells, **failing), setting(tmp_path), Heard())
    heard = Heard()
    got = runner.run(bench([cells[0], Cell("next", rounds=1)]), setting(tmp_path), heard)
    assert heard.begun[0] == ("good", [])
    assert heard.plans[0].kept == {"good"}
    assert list(got.cells) == ["good", "next"]
    again = Heard()
    runner.run(bench([good]), setting(tmp_path), again)
    assert again.plans[0].kept == frozenset()


@pytest.mark.parametrize("change", ["params", "rounds", "threads", "fresh"])
def test_a_kept_cell_is_not_taken_for_another(tmp_path: Path, change: str) -> None:
    cell = Cell("one", {"base_s": 1.0}, rounds=1)
    runner.run(bench([cell]), setting(tmp_path), Heard())
    path = tmp_path / "bench-demo" / records.FILE_NAME
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in whole if '"finished"' not in line))
    params = {"base_s": 2.0} if change == "params" else cell.params
    other = Cell("one", params, rounds=2 if change == "rounds" else 1)
    how = runner.Setting(ROOT, tmp_path, threads=2 if change == "threads" else 1, fresh=change == "fresh")
    heard = Heard()
    runner.run(bench([other]), how, heard)
    assert heard.plans[0].kept == frozenset()


def test_metrics_keep_their_names(tmp_path: Path) -> None:
    renaming = ContenderEntry(ENTRY + "Failing", {"how": "rename"})
    with pytest.raises(ProtocolError, match="minutes"):
        runner.run(bench([Cell("one", rounds=3, warmup=0)], ours=renaming), setting(tmp_path), Heard())


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([Cell("one"), Cell("one")], "two cells of one name"),
        ([Cell("one", contenders=("who",))], "who"),
        ([Cell("one", rounds=0)], "rounds >= 1"),
    ],
)
def test_cells_that_make_no_sense_are_refused(tmp_path: Path, cells: list[Cell], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        runner.run(bench(cells), setting(tmp_path), Heard())


def test_the_estimate_counts_every_sample_and_start() -> None:
    demo = bench([])
    cell = Cell("one", rounds=9, warmup=1, sample_s=2.0)
    assert runner._estimate_s(demo, cell) == pytest.approx(3 * (runner.START_S + 20.0))


def test_threads_are_resolved_to_the_cores() -> None:
    assert runner.Setting(ROOT, ROOT).resolve().threads >= 1
    with pytest.raises(ConfigError, match="threads"):
        runner.Setting(ROOT, ROOT, threads=-1).resolve()
