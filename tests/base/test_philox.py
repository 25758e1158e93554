"""Philox against the published known answers and the house's own vectors; the noise rule's ends."""

from __future__ import annotations

import numpy as np
import pytest

from tenon.base import philox

# Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: str, key: str, words: str) -> None:
    k0, k1 = hexes(key)
    assert philox.philox4x32(np.array([hexes(counter)], np.uint32), (k0, k1)).tolist() == [hexes(words)]


@pytest.mark.parametrize(("seed", "sample", "position", "token", "word"), philox.TEST_VECTORS)
def test_vectors(seed: int, sample: int, position: int, token: int, word: int) -> None:
    assert philox.words(seed, sample, position, np.array([token])).tolist() == [word]


def test_words_do_not_depend_on_which_tokens_are_asked_for() -> None:
    tokens = np.random.default_rng(0).permutation(1000)
    whole = philox.words(2**64 - 1, 3, 2**31, np.arange(1000))
    assert (philox.words(2**64 - 1, 3, 2**31, tokens) == whole[tokens]).all()
    assert len(np.unique(whole)) > 990


def test_each_part_of_the_key_changes_the_words() -> None:
    tokens = np.arange(64)
    streams = [(1, 0, 0), (2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1)]
    drawn = {philox.words(*stream, tokens).tobytes() for stream in streams}
    assert len(drawn) == len(streams)


def test_noise_is_finite_at_both_ends_and_within_its_bounds() -> None:
    ends = philox.gumbel(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32))
    assert np.isfinite(ends).all()
    assert ends.max() <= philox.GUMBEL_MAX
    assert ends.min() >= philox.GUMBEL_MIN


def test_the_uniform_is_never_0_or_1() -> None:
    u = (np.array([0, 2**32 - 1], np.uint32).astype(np.float64) + 0.5) * 2.0**-32
    assert u[0] == 2.0**-33
    assert u[1] == 1 - 2.0**-33


def test_noise_has_the_mean_and_spread_of_a_gumbel() -> None:
    g = philox.noise(7, 0, 0, np.arange(200_000))
    assert abs(g.mean() - 0.5772) < 0.01
    assert abs(g.var() - np.pi**2 / 6) < 0.03


def test_derived_seeds_differ_by_path_and_are_64_bits() -> None:
    seeds = {philox.derive(5), philox.derive(5, 0), philox.derive(5, 1), philox.derive(5, 0, 1), philox.derive(5, 1, 0)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert philox.derive(5, 1, 0) == philox.derive(5, 1, 0)
