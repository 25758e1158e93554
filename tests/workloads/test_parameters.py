"""Every parameter has its source; overrides reach generators or are refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.workloads.draws import Contents, Streams
from tenon.workloads.generator import GENERATORS
from tenon.workloads.parameters import Given, Quantiles, Steps, families

ROWS = [[0, 2.0], [50, 8.0], [90, 100.0], [100, 400.0]]


def test_every_family_has_a_generator_and_every_value_its_source() -> None:
    assert set(families()) == set(GENERATORS)
    for name, family in families().items():
        assert family.title, name
        assert family.source, name
        for key, one in [*family.parameters.items(), *family.figures.items(), *family.curves.items()]:
            assert len(one.source) > 3, f"{name} {key}"


@pytest.mark.parametrize("name", GENERATORS)
def test_measured_and_cited_sources_name_a_publication_or_a_file(name: str) -> None:
    known = ("arXiv", "FAST", ".csv", ".jsonl", "Thoughtworks", "ShareGPT", "notebook")
    for key, one in families()[name].parameters.items():
        if one.how != "assumed":
            assert any(word in one.source for word in known), key


def test_quantiles_pass_through_their_rows_and_never_fall() -> None:
    table = Quantiles(ROWS)
    assert [table.at(row[0] / 100) for row in ROWS[:-1]] == pytest.approx([2, 8, 100])
    values = np.array([table.at(u) for u in np.linspace(0, 0.999999, 5000)])
    assert (np.diff(values) >= 0).all()
    assert values[-1] == pytest.approx(400, rel=1e-3)
    assert table.mean() == pytest.approx(values.mean(), rel=2e-3)


def test_rows_that_begin_at_zero_are_joined_by_straight_lines() -> None:
    table = Quantiles([[0, 0.0], [50, 0.0], [100, 10.0]])
    assert (table.at(0.25), table.at(0.75), table.mean()) == (0.0, 5.0, 2.5)


def test_steps_take_the_last_row_that_begins_below() -> None:
    steps = Steps([[10, 1.0], [20, 2.0]])
    assert [steps.at(x) for x in (0, 10, 19.9, 20, 1e9)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "ask", "said"),
    [
        ({"ratee": 1}, None, "has no parameter 'ratee'; it has .*rate"),
        ({"rate": "fast"}, None, "rate must be a number, got 'fast'"),
        ({"rate": True}, None, "rate must be a number"),
        ({"rate": float("inf")}, None, "rate must be a number"),
        ({"dispersion": 3}, None, "dispersion must be text"),
        ({"dispersion": "mid"}, lambda g: g.word("dispersion", ("low", "high")), "one of low, high, got 'mid'"),
        ({"rate": 0}, lambda g: g.number("rate", above=True), "rate must be more than 0, got 0"),
        ({"rate": 3}, lambda g: g.share("rate"), "at least 0 and at most 1, got 3"),
        ({"turns": 1.5}, lambda g: g.count("turns"), "turns must be a whole number of at least 1, got 1.5"),
    ],
)
def test_a_wrong_override_is_refused_by_name(overrides: dict, ask: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(Given("longbench", overrides))  # type: ignore[operator]


@pytest.mark.parametrize(
    "rows", [[], [[0, 1]], [[0, 1], [90, 2]], [[5, 1], [100, 2]], [[0, 2], [100, 1]], [[0, 1, 2]], "x", [[0, "a"]]]
)
def test_wrong_rows_are_refused(rows: object) -> None:
    with pytest.raises(ConfigError, match="gap_s must be"):
        Given("azure-2023-conv", {"gap_s": rows}).quantiles("gap_s")


@pytest.mark.parametrize("rows", [[[5, 1], [5, 2]], [[0, -1]]])
def test_wrong_steps_are_refused(rows: object) -> None:
    with pytest.raises(ConfigError, match="again_first must be"):
        Given("mooncake-conversation", {"again_first": rows}).steps("again_first")


@given(st.integers(0, 2**63), st.text(max_size=5), st.text(max_size=5))
def test_a_purpose_has_a_stream_of_its_own(seed: int, one: str, other: str) -> None:
    draws = [Streams(seed, "x").of(purpose).random(4).tolist() for purpose in (one, one, other)]
    assert draws[0] == draws[1]
    assert (draws[0] == draws[2]) == (one == other)


def test_contents_of_two_seeds_are_apart_and_fit_a_double() -> None:
    made = [[contents.new() for _ in range(100)] for contents in (Contents(0, "a"), Contents(1, "a"), Contents(0, "b"))]
    assert len({number for numbers in made for number in numbers}) == 300
    assert max(map(max, made)) < 2**53
