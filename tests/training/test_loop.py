"""The loop: a run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tenon.base.errors import CheckpointError
from tenon.models.decoder import Decoder
from tenon.models.spec import ModelSpec
from tenon.training import loop
from tenon.training.objectives import Lengths, Mixture, NextToken
from tenon.training.optimizers import Rates
from tenon.training.rows import Rows
from tenon.training.schedule import Wsd

SPEC = ModelSpec(
    "qwen3", vocab_size=64, hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16,
    intermediate_size=48, max_position=128, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
LENGTHS = Lengths(((0, 16), (4, 32)))


@pytest.fixture
def rows() -> Rows:
    rng = np.random.default_rng(3)
    return Rows([np.sort(rng.integers(4, 64, 200)).astype(np.uint16) for _ in range(6)], seed=5)


def fresh(folder: Path, stop: int, decay_at: int = 6) -> loop.Run:
    model = Decoder(SPEC)
    loop.initialise(model, seed=1)
    config = loop.LoopConfig(Wsd(2, decay_at, stop), batch_tokens=64, rates=Rates(), log_every=1)
    return loop.Run(model, config, folder)


def objective(rows: Rows) -> NextToken:
    return NextToken(Mixture(rows, LENGTHS, 64), part_tokens=32)


def same(a: loop.Run, b: loop.Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_resumed_run_equals_uninterrupted_bit_for_bit(rows: Rows, tmp_path: Path) -> None:
    whole = fresh(tmp_path / "a", stop=10)
    assert whole.run(objective(rows))
    first = fresh(tmp_path / "b", stop=5, decay_at=5)
    assert first.run(objective(rows))
    second = fresh(tmp_path / "b", stop=10)
    assert second.resume()
    second.run(objective(Rows(rows.documents, rows.seed)))
    assert same(whole, second)
    assert second.progress.iteration == 10
    assert second.progress.cursor == whole.progress.cursor


def test_another_seed_ends_elsewhere(rows: Rows, tmp_path: Path) -> None:
    one, other = fresh(tmp_path / "a", stop=6), fresh(tmp_path / "b", stop=6)
    one.run(objective(rows))
    other.run(objective(Rows(rows.documents, seed=6)))
    assert not same(one, other)


def test_state_before_the_decay_is_kept(rows: Rows, tmp_path: Path) -> None:
    fresh(tmp_path, stop=8).run(objective(rows))
    longer = fresh(tmp_path, stop=12, decay_at=9)
    assert longer.resume(loop.STABLE)
    assert longer.progress.iteration == 6
    reports: list[loop.Report] = []
    longer.run(objective(rows), reports.append)
    assert [r.iteration for r in reports] == [7, 8, 9, 10, 11, 12]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 12


def test_loss_falls(rows: Rows, tmp_path: Path) -> None:
    reports: list[loop.Report] = []
    fresh(tmp_path, stop=40, decay_at=30).run(objective(rows), reports.append)
    assert reports[-1].loss < 0.8 * reports[0].loss


def test_state_of_another_shape_is_refused(rows: Rows, tmp_path: Path) -> None:
    fresh(tmp_path, stop=6).run(objective(rows))
    with pytest.raises(CheckpointError, match="does not fit"):
        loop.set_weights(Decoder(SPEC), {})


def test_damaged_state_names_its_file(tmp_path: Path) -> None:
    (tmp_path / loop.NEWEST).write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        fresh(tmp_path, stop=6).resume()


def test_a_draft_inherits_embedding_and_first_layers() -> None:
    source, model = Decoder(SPEC), Decoder(SPEC)
    loop.initialise(source, seed=1)
    loop.initialise(model, seed=2)
    loop.inherit(model, source, n_layers=1)
    assert torch.equal(model.lm_head.weight, source.embed.weight)
    assert torch.equal(model.layers[0].qkv.weight, source.layers[0].qkv.weight)
    assert not torch.equal(model.layers[1].qkv.weight, source.layers[1].qkv.weight)
