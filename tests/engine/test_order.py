"""Who comes in first: by arrival, by what is due, and a fair share for every tenant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tenon.engine.policies.order import ORDERS, PATIENCE_S, Coming, Edf, Fair, Fifo


def test_the_first_come_is_the_first_served() -> None:
    assert [Fifo().due_s(Coming(t, "a", 9.0, ttft_s=1 / (1 + t))) for t in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]


def test_what_is_due_earlier_goes_first_and_who_is_promised_nothing_waits_no_longer_than_patience() -> None:
    order = Edf()
    late, soon = order.due_s(Coming(0.0, "a", 1.0)), order.due_s(Coming(1.0, "a", 1.0, ttft_s=0.5))
    assert soon < late == PATIENCE_S
    assert order.due_s(Coming(PATIENCE_S, "a", 1.0, ttft_s=0.5)) > late


def test_who_sends_much_waits_behind_itself() -> None:
    order = Fair()
    flood = [order.due_s(Coming(0.0, "flood", 2.0)) for _ in range(10)]
    assert flood == sorted(flood)
    other = order.due_s(Coming(1.0, "other", 2.0))
    assert flood[0] < other < flood[1]
    # With two tenants each gets half of the device: what flood sends now takes twice as long.
    before = order.due_s(Coming(1.0, "flood", 2.0))
    assert order.due_s(Coming(1.0, "flood", 2.0)) == before + 4.0


def test_who_weighs_more_gets_more() -> None:
    light, heavy = Fair(), Fair()
    for _ in range(3):
        last_light, last_heavy = light.due_s(Coming(0, "a", 2.0)), heavy.due_s(Coming(0, "a", 2.0, weight=2.0))
    assert last_heavy < last_light


def test_when_nothing_of_a_tenant_is_left_nothing_is_owed() -> None:
    order = Fair()
    for _ in range(5):
        order.due_s(Coming(0.0, "a", 10.0))
    for _ in range(5):
        order.ended("a")
    assert order.due_s(Coming(1.0, "a", 10.0)) == 1.0 + PATIENCE_S


ARRIVALS = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 5), st.floats(0.1, 4), st.none() | st.floats(0.01, 30)),
    max_size=40,
)


@given(arrivals=ARRIVALS)
def test_everybody_is_due_at_some_time_and_a_flood_delays_its_own_tenant_alone(
    arrivals: list[tuple[str, float, float, float | None]],
) -> None:
    """Fair: what one tenant is given does not depend on how much the others send, but for how many they are."""
    for name in ORDERS:
        order, now_s = ORDERS[name](), 0.0
        for tenant, gap_s, cost_s, ttft_s in arrivals:
            now_s += gap_s
            assert now_s <= order.due_s(Coming(now_s, tenant, cost_s, ttft_s=ttft_s)) < float("inf")
    alone, crowded, now_s = Fair(), Fair(), 0.0
    for who in ("a", "b"):
        alone.due_s(Coming(0.0, who, 1.0))
        crowded.due_s(Coming(0.0, who, 1.0))
    for tenant, gap_s, cost_s, ttft_s in arrivals:
        now_s += gap_s
        if tenant == "a":
            mine = Coming(now_s, "a", cost_s, ttft_s=ttft_s)
            assert alone.due_s(mine) == crowded.due_s(mine)
        else:
            crowded.due_s(Coming(now_s, "b", cost_s))
