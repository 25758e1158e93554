"""Block pools: who holds what, what is shared, what gives way; keys that cannot be guessed or forged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenon.base.errors import ConfigError, IntegrityError
from tenon.engine.blocks import BlockPool, chain_digest, root_digest
from tenon.engine.config import state_secret
from tenon.engine.kv_log import REMOVED
from tenon.engine.messages import Add
from tenon.engine.policies.evict import Cached
from tenon.engine.policies.recency import Lru
from tests.engine.build import hash_engine, run

SECRET = b"s" * 32


def pool(n_blocks: int = 6) -> BlockPool:
    return BlockPool(n_blocks, 16, Lru)


def published(p: BlockPool, names: bytes) -> list[int]:
    """Blocks published under one-byte keys and let go in order."""
    blocks = [p.take() for _ in names]
    for block, name in zip(blocks, names, strict=True):
        p.publish(block, bytes([name]), b"tokens")
        p.release(block)
    return blocks


def test_blocks_are_conserved_and_the_null_block_is_never_given_out() -> None:
    p = pool()
    held = [p.take() for _ in range(5)]
    assert sorted(held) == [1, 2, 3, 4, 5]
    assert (p.n_available, p.n_held, p.n_idle) == (0, 5, 0)
    with pytest.raises(LookupError):
        p.take()
    p.check_integrity([np.array(held)])


def test_the_last_holder_frees() -> None:
    p = pool()
    block = p.take()
    p.share(block)
    p.release(block)
    assert p.n_held == 1
    p.release(block)
    assert p.n_held == 0
    with pytest.raises(IntegrityError, match="did not hold"):
        p.release(block)


def test_published_blocks_stay_until_needed_and_the_oldest_goes_first() -> None:
    p = pool()
    a, b, c = published(p, b"abc")
    assert (p.n_idle, p.n_available) == (3, 5)
    p.take_over(a)
    p.release(a)
    assert [p.take() for _ in range(2)] == [4, 5]
    assert p.take() == b
    assert p.lookup(b"b", b"tokens") is None
    assert p.lookup(b"a", b"tokens") == a
    assert p.take() == c
    assert [(e.key, e.reason) for e in p.log if e.kind == REMOVED] == [(b"b", "evicted"), (b"c", "evicted")]


def test_a_hit_compares_tokens_so_that_a_collision_serves_nothing() -> None:
    p = pool()
    (block,) = published(p, b"a")
    assert p.lookup(b"a", b"tokens") == block
    assert p.lookup(b"a", b"others") is None


def test_the_first_to_publish_a_key_keeps_it() -> None:
    p = pool()
    first, second = p.take(), p.take()
    p.publish(first, b"a", b"tokens")
    p.publish(second, b"a", b"tokens")
    p.release(second)
    assert p.lookup(b"a", b"tokens") == first
    p.check_integrity([np.array([first])])


def test_forgetting_frees_idle_blocks_and_leaves_held_ones() -> None:
    p = pool()
    published(p, b"ab")
    held = p.take()
    p.publish(held, b"c", b"tokens")
    p.forget()
    assert (p.n_idle, p.n_held, p.n_available) == (0, 1, 4)
    assert all(p.lookup(bytes([name]), b"tokens") is None for name in b"abc")
    p.check_integrity([np.array([held])])


@pytest.mark.parametrize("spoil", ["ref", "null", "index", "lost", "neighbour"])
def test_integrity_names_what_is_off(spoil: str) -> None:
    p = pool()
    held, table = p.take(), np.array([1])
    if spoil == "ref":
        p.ref[held] = 2
    elif spoil == "null":
        table = np.array([1, 0])
    elif spoil == "index":
        p.publish(held, b"a", b"tokens")
        p._entry[held] = None
    elif spoil == "neighbour":
        p.publish(held, b"a", b"tokens")
        next(iter(p.entries)).parent = Cached(2, b"gone", 0, 1.0)
    else:
        p._free.pop()
    with pytest.raises(IntegrityError):
        p.check_integrity([table])


class Colliding(BlockPool):
    """Keys cut to 8 bits, or to fewer: of a few hundred blocks many collide."""

    n_bits = 8
    n_collided = 0
    """Lookups that found a block of this key and other tokens."""

    def short(self, digest: bytes) -> bytes:
        return bytes([digest[0] % (1 << self.n_bits)])

    def publish(self, block: int, digest: bytes, content: bytes, *more: Any) -> None:
        super().publish(block, self.short(digest), content, *more)

    def knows(self, digest: bytes) -> bool:
        return super().knows(self.short(digest))

    def lookup(self, digest: bytes, tokens: bytes) -> int | None:
        found = super().lookup(self.short(digest), tokens)
        self.n_collided += found is None and self.knows(digest)
        return found


@pytest.mark.parametrize(("n_bits", "n_blocks"), [(3, 12), (8, 300)])
def test_sequences_with_colliding_keys_are_served_right(n_bits: int, n_blocks: int) -> None:
    """Each prompt comes twice: what is right is found again, what only has the same key never."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 1000, 50).tolist()) for _ in range(60)]
    adds = [Add(f"r{i}", prompts[i % 60], 4, i) for i in range(120)]
    made = hash_engine(n_blocks)
    made.scheduler.pools = [Colliding(n_blocks, 16, Lru) for _ in made.scheduler.pools]
    for pool in made.scheduler.pools:
        pool.n_bits = n_bits  # type: ignore[attr-defined]
    assert run(made, adds) == run(hash_engine(600, prefix_cache=False), adds)
    assert all(pool.n_collided > 10 for pool in made.scheduler.pools)  # type: ignore[attr-defined]
    if n_bits == 8:
        assert made.stats(0.0).cached_tokens > 0


def test_digests_depend_on_every_part() -> None:
    roots = [root_digest(SECRET, *parts) for parts in (("m", "0", ""), ("m", "0", "a"), ("m", "1", ""), ("m0", "", ""))]
    roots.append(root_digest(b"t" * 32, "m", "0", ""))
    chained = [chain_digest(SECRET, root + tokens) for root in roots for tokens in (b"x", b"y")]
    assert len({*roots, *chained}) == len(roots) + len(chained)
    assert {len(d) for d in chained} == {32}


def test_tenants_never_share() -> None:
    made, prompt = hash_engine(), tuple(range(64))
    run(made, [Add("a", prompt, 2, 0, tenant="one")])
    run(made, [Add("b", prompt, 2, 0, tenant="two")])
    assert made.stats(0.0).cached_tokens == 0
    run(made, [Add("c", prompt, 2, 0, tenant="one")])
    assert made.stats(0.0).cached_tokens == 48


def test_other_weights_never_share() -> None:
    made, prompt = hash_engine(), tuple(range(64))
    first = run(made, [Add("a", prompt, 4, 0)])
    made.load_weights("other", 1)
    second = run(made, [Add("a", prompt, 4, 0)])
    assert made.stats(0.0).cached_tokens == 0
    assert first != second


def test_the_key_is_made_once_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    key = state_secret(folder)
    path = folder / "block-hash.key"
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert state_secret(folder) == key
    assert state_secret(tmp_path / "elsewhere") != key


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "block-hash.key"
    path.write_bytes(b"short")
    os.chmod(path, 0o600)
    with pytest.raises(ConfigError, match=r"block-hash\.key must hold 32 bytes, holds 5"):
        state_secret(tmp_path)
