"""Each eviction policy against its paper's rule, on traces small enough to follow by hand; AsymCache's algebra."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tenon.engine.policies.asymcache import AsymCache
from tenon.engine.policies.evict import Cached, Evict, Heap
from tenon.engine.policies.latency import Gdsf, MaxScore, Pensieve, RandomCompute
from tenon.engine.policies.recency import Arc, Lfu, Lru, S3Fifo, TailLru


class Story:
    """Blocks by one-letter names, told to a policy in the pool's order. The clock is what ``at`` says."""

    def __init__(self, policy: Evict) -> None:
        self.policy, self.now_s, self.n = policy, 0.0, 0
        self.of: dict[str, Cached] = {}

    def at(self, now_s: float) -> Story:
        self.now_s = now_s
        return self

    def hold(self, name: str, cost: float = 1.0, position: int = 0, turn: int = 1) -> Cached:
        self.n += 1
        entry = Cached(self.n, name.encode(), position, cost, turn, 1, self.now_s)
        self.policy.stored(entry, self.now_s)
        self.of[name] = entry
        return entry

    def leave(self, name: str, length: int = 100_000) -> None:
        entry = self.of[name]
        entry.last_s, entry.length = self.now_s, length
        self.policy.idle(entry, self.now_s)

    def add(self, names: str, cost: float = 1.0, position: int = 0, turn: int = 1, length: int = 100_000) -> Story:
        """Stored, then let go of, one after the other."""
        for name in names:
            self.hold(name, cost, position, turn)
            self.leave(name, length)
        return self

    def take(self, name: str) -> None:
        """An idle block is used and held."""
        entry = self.of[name]
        self.policy.used(entry, self.now_s)
        self.policy.busy(entry)
        entry.n_uses += 1

    def share(self, name: str) -> None:
        """A held block is used."""
        self.policy.used(self.of[name], self.now_s)
        self.of[name].n_uses += 1

    def use(self, names: str) -> Story:
        for name in names:
            self.take(name)
            self.leave(name)
        return self

    def out(self, n: int) -> str:
        """Names of the next ``n`` victims, which are evicted."""
        found = ""
        for _ in range(n):
            entry = self.policy.victim(self.now_s)
            self.policy.evicted(entry, self.now_s)
            found += entry.key.decode()
            del self.of[entry.key.decode()]
        return found


def test_lru_evicts_what_was_used_longest_ago() -> None:
    assert Story(Lru()).add("abcd").use("bad").out(4) == "cbad"


def test_lfu_evicts_what_was_used_least() -> None:
    assert Story(Lfu()).add("abcd").use("abbad").out(4) == "cdba"


def test_gdsf_weighs_uses_by_cost_and_what_is_not_used_is_overtaken() -> None:
    story = Story(Gdsf()).add("a", cost=5).add("bc", cost=1).use("b")
    assert story.out(2) == "cb"  # the clock is at 2 now
    assert story.add("d", cost=1).out(1) == "d"  # 2 + 1 is less than 5; the clock goes to 3
    assert story.add("e", cost=3).out(1) == "a"  # 3 + 3 is more than 5


# -- S3-FIFO (SOSP 2023, Algorithm 1) --------------------------------------------------------------------------


def test_s3fifo_evicts_one_hit_wonders_first() -> None:
    story = Story(S3Fifo(10)).add("abcdef").use("aab")
    assert story.out(4) == "bcde"  # one more use does not save b; a goes to the main queue
    assert story.out(1) == "a"  # the small queue has its tenth: the main one gives
    assert story.out(1) == "f"


def test_s3fifo_remembers_what_left_too_soon() -> None:
    story = Story(S3Fifo(10)).add("abcd")
    assert story.out(1) == "a"
    assert story.add("a").out(2) == "bc"  # back from the ghosts into the main queue
    assert Story(S3Fifo(10)).add("bcda").out(4) == "bcda"


def test_s3fifo_gives_the_main_queue_as_many_chances_as_uses() -> None:
    story = Story(S3Fifo(20)).add("abcdefg").use("aabb")
    assert story.out(3) == "cde"  # a and b have moved, their uses forgotten; two stay in the small queue
    assert story.use("b").out(3) == "abf"


def test_s3fifo_counts_uses_of_held_blocks() -> None:
    story = Story(S3Fifo(10))
    story.hold("a")
    story.share("a")
    story.share("a")
    story.leave("a")
    assert story.add("bcd").out(2) == "bc"


def test_s3fifo_takes_over_from_another_policy() -> None:
    """What was let go before is a newcomer: in the main queue, blocks that nobody wants again would never leave."""
    before, story = Story(Lru()).add("abcdefgh"), Story(S3Fifo(10))
    for name, entry in before.of.items():
        story.of[name] = entry
        story.policy.idle(entry, 0.0)
    assert story.use("cc").out(3) == "abd"
    story.n = before.n
    assert story.add("x").out(3) == "efg"


# -- ARC (FAST 2003, Figure 4) ---------------------------------------------------------------------------------


def test_arc_hits_of_ghosts_move_the_target() -> None:
    policy = Arc(4)
    story = Story(policy).add("abcd")
    assert story.out(2) == "ab"
    story.add("a")  # was used once: more room for those, by max(1, 0 / 2)
    assert policy._target == 1
    assert story.out(2) == "ca"  # d alone is no more than the target
    story.add("a")  # was used again: less room, by max(1, 2 / 1)
    assert policy._target == 0
    assert story.out(2) == "da"


def test_arc_keeps_what_was_used_again_from_a_scan() -> None:
    story = Story(Arc(4)).add("ab").use("ab")
    assert story.add("cd").out(2) == "cd"
    assert story.add("ef").out(4) == "efab"


def test_arc_counts_uses_of_held_blocks() -> None:
    story = Story(Arc(4))
    story.hold("a")
    story.share("a")
    story.leave("a")
    assert story.add("b").out(2) == "ba"


def test_arc_lists_and_their_ghosts_are_bounded() -> None:
    policy = Arc(4)
    story = Story(policy).add("ab").use("ab")
    for name in "cdefghijklmnopqrstuvwxyz":
        story.add(name).out(1)
        assert len(policy._once) + len(policy._ghosts_once) <= 4
        assert len(policy) + len(policy._ghosts_once) + len(policy._ghosts_again) <= 8
    assert list(policy._ghosts_once) == [b"w", b"x", b"y", b"z"]


# -- T-LRU (arXiv 2510.15152), Pensieve (arXiv 2312.05516) -----------------------------------------------------


def test_tlru_evicts_tails_first() -> None:
    story = Story(TailLru(1024)).add("a", position=0, length=8000).add("b", position=6976, length=8000)
    story.add("c", position=6975, length=8000).add("d", position=7984, length=8000).add("e", position=0, length=1000)
    assert story.out(5) == "bdeac"


def test_tlru_a_tail_is_none_once_its_context_went_on() -> None:
    story = Story(TailLru(1024)).add("a", position=7000, length=8000).add("b", position=0)
    story.take("a")
    story.leave("a", length=9000)
    assert story.out(2) == "ba"


def test_pensieve_evicts_leading_blocks_first() -> None:
    story = Story(Pensieve())
    for i, name in enumerate("abcd"):
        story.add(name, cost=1 + i / 4, position=i * 16)
    assert story.at(10).out(4) == "abcd"


def test_pensieve_weighs_cost_by_idle_time() -> None:
    story = Story(Pensieve()).add("a", cost=4).at(9).add("b", cost=1)
    assert story.at(10).out(2) == "ab"  # 0.4 and 1 per second
    story = Story(Pensieve()).add("a", cost=4).at(5).add("b", cost=1)
    assert story.at(10).out(2) == "ba"  # 0.4 and 0.2


# -- Max-score (KVCache in the wild, ATC 2025) -----------------------------------------------------------------


def classes(short_s: float = 1.0, long_s: float = 2000.0) -> Story:
    """First turns came back after ``long_s``, second ones after ``short_s``; both were used just now."""
    story = Story(MaxScore()).add("a", turn=1)
    for _ in range(2000):
        story.at(story.now_s + long_s).use("a")
    story.add("b", turn=2)
    for _ in range(2000):
        story.at(story.now_s + short_s).use("b")
    story.take("a")
    story.leave("a")
    return story


def test_max_score_keeps_the_class_that_comes_back_soon() -> None:
    story = classes()
    assert story.at(story.now_s + 1).out(2) == "ab"


def test_max_score_gives_it_up_when_its_time_is_over() -> None:
    story = classes()
    assert story.at(story.now_s + 60).out(2) == "ba"


def test_max_score_learns_which_class_does_not_come_back() -> None:
    story = Story(MaxScore())
    for _ in range(100):
        story.add("a", turn=2).out(1)
    assert story.add("b", turn=1).add("c", turn=2).out(2) == "cb"


def test_max_score_counts_a_return_for_the_class_that_left() -> None:
    policy = MaxScore()
    entry = Cached(1, b"a", 0, 1.0, turn=2, away_s=1.0, away_turn=1)
    policy.stored(entry, 5.0)
    assert policy._share[0] > policy._share[1]


# -- partial-node RandomCompute (arXiv 2609.28870) -------------------------------------------------------------


def test_random_compute_goes_along_a_context_to_its_end() -> None:
    story = Story(RandomCompute()).add("abcdefgh").add("stuvwxyz")
    for first, second in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "st", "tu", "uv", "vw", "wx", "xy", "yz"):
        story.of[first].child = story.of[second]
    found = story.out(16)
    assert sorted(found) == list("abcdefghstuvwxyz")
    for i, (name, then) in enumerate(pairwise(found)):
        follower = chr(ord(name) + 1)
        assert then == follower or name in "hz" or follower in found[:i]


def test_random_compute_skips_a_held_block_and_draws_anew() -> None:
    story = Story(RandomCompute()).add("abc")
    story.of["a"].child = story.of["b"]
    while story.out(1) != "a":  # until the draw that begins the context
        story = Story(story.policy).add("abc")
        story.of["a"].child = story.of["b"]
    story.take("b")
    assert story.out(1) == "c"


def test_random_compute_draws_cheap_blocks_sooner() -> None:
    names = "".join(map(chr, range(0x100, 0x180)))
    story = Story(RandomCompute()).add(names[:64], cost=1).add(names[64:], cost=100)
    assert sum(name in names[:64] for name in story.out(32)) >= 28


# -- AsymCache (arXiv 2606.02964, section 4) -------------------------------------------------------------------


def weight(policy: AsymCache, age_s: float, cost: float = 1.0) -> float:
    return math.exp(policy.score(Cached(1, b"", 0, cost), age_s))


@pytest.mark.parametrize("lifespan_s", [2.0, 600.0, 30_000.0])
def test_the_weight_is_p_at_the_lifespan_and_bends_there(lifespan_s: float) -> None:
    """Eq. 9: both exponentials meet at age L, where they are p; the second is r times as steep."""
    policy = AsymCache(lifespan_s)
    assert weight(policy, 0.0) == 1.0
    assert weight(policy, lifespan_s) == pytest.approx(policy.P)
    assert math.exp(-(lifespan_s - policy.tau0) / policy.beta) == pytest.approx(policy.P)
    step_s = lifespan_s / 1000

    def slope(at_s: float) -> float:
        return math.log(weight(policy, at_s + step_s) / weight(policy, at_s)) / step_s

    assert slope(0.5 * lifespan_s) == pytest.approx(-1 / policy.alpha)
    assert slope(1.1 * lifespan_s) / slope(0.5 * lifespan_s) == pytest.approx(policy.RATIO)


def test_the_weight_is_proportional_to_the_cost() -> None:
    policy = AsymCache()
    for age_s in (0.0, 300.0, 700.0):
        assert weight(policy, age_s, 7.0) == pytest.approx(7 * weight(policy, age_s))


def test_order_within_one_exponential_never_changes() -> None:
    """Eq. 8, and why there are two heaps: the lesser of two exponentials does not keep it."""
    policy = AsymCache(600.0)
    old, new = Cached(1, b"", 0, 2.0, last_s=0.0), Cached(2, b"", 0, 1.0, last_s=200.0)

    def is_old_first(now_s: float) -> bool:
        return policy.score(old, now_s) < policy.score(new, now_s)

    assert {is_old_first(200.0 + t) for t in range(0, 400, 10)} == {False}  # both before the bend
    assert {is_old_first(800.0 + t) for t in range(0, 10_000, 100)} == {True}  # both behind it


def learned(ages_s: list[float]) -> AsymCache:
    policy = AsymCache()
    story = Story(policy).add("a")
    for age_s in ages_s:
        story.at(story.now_s + age_s).use("a")
    return policy


def test_lifespan_and_bend_follow_observed_reuse() -> None:
    """L is the 99th percentile; lambda (Eq. 10) puts the bend at the mean."""
    ages_s = [100.0 + i % 101 * 2 for i in range(AsymCache.REFIT)]
    policy, mean_s = learned(ages_s), sum(ages_s) / len(ages_s)
    assert policy.lifespan_s == pytest.approx(298.0, abs=2)
    near, before, after, far = (math.log(weight(policy, mean_s + d)) for d in (-20.0, -0.001, 0.001, 20.0))
    assert (near - before) / 20 == pytest.approx(1 / policy.alpha, rel=1e-3)
    assert (after - far) / 20 == pytest.approx(1 / policy.beta, rel=1e-3)


def test_a_use_of_a_held_block_tells_no_age() -> None:
    policy = AsymCache()
    for told in (policy, MaxScore()):
        story = Story(told)
        story.hold("a")
        for i in range(2 * AsymCache.REFIT):
            story.at(10.0 * i).share("a")
    assert (policy.lifespan_s, policy.log_lambda) == (600.0, 0.0)
    assert isinstance(told, MaxScore)
    assert told._mean_s == [60.0] * MaxScore.CLASSES


# -- the heap --------------------------------------------------------------------------------------------------


def test_a_heap_refilled_is_a_heap_pushed_into() -> None:
    entries = [Cached(b, b"", 0, 1.0) for b in range(50)]
    keys = [float(b * 7 % 5) for b in range(50)]
    pushed, filled = Heap(), Heap()
    for heap in (pushed, filled):
        heap.push(entries[7], -1.0)
    for entry, key in zip(entries, keys, strict=True):
        pushed.push(entry, key)
    filled.refill(zip(entries, keys, strict=True))
    for _ in range(50):
        assert pushed.first() == filled.first()
        for heap in (pushed, filled):
            heap.discard(heap.first()[1])
    for heap in (pushed, filled):
        with pytest.raises(LookupError):
            heap.first()


def test_a_heap_forgets_what_was_taken_out() -> None:
    heap, entries = Heap(), [Cached(b, b"", 0, 1.0) for b in range(10)]
    for i in range(10_000):
        heap.push(entries[i % 10], float(i))
    assert len(heap) == len(heap.entries()) == 10
    assert len(heap._items) <= 2 * 10 + 64
    assert heap.n_moves < 10_000 * 10
