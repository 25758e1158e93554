"""The card's page and picture from recorded figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tenon.training import checkpoint, loop
from tenon.training.recipes import card, embedded

ROW = {"name": "json", "n_bytes": 1000, "n_tokens": 250, "model": 1.2, "gzip": 2.0, "xz": 1.8, "of_xz": 0.667}
CARD = {
    "command": "make it", "seed": 1, "python": "3.11", "torch": "2",
    "data": {
        "train_files": 2, "train_bytes": 10, "held_out_packages": ["json"], "held_out_files": 1,
        "held_out_bytes": 1000, "left_out_files": {"table": 3},
    },
    "parameters": {"target": 5_500_000, "draft": 1_500_000},
    "weight_bytes": {"target": 11_000_000, "draft": 3_000_000},
    "stages": {"target": {"iteration": 10, "tokens": 1_000_000, "cpu_s": 120.0}},
    "bits_per_byte": {
        "window": 2048, "stride": 512, "files_overall": ROW, "packages_overall": ROW, "packages": [ROW], "files": [ROW],
    },
    "acceptance": {
        "positions": 100, "agreement": 0.5, "expected": 0.45, "prompts": 4, "n_draft": 4, "accepted_greedy": 1.25,
    },
}  # fmt: skip


def test_page_shows_the_figures() -> None:
    page = card.page(CARD)
    assert "| json | 1,000 | 1.200 | 2.000 | 1.800 | 0.667 |" in page
    assert "14.0 MB of weights" in page
    assert "1.25 of 4 drafted tokens" in page
    assert "50.0%" in page


def test_picture_is_drawn_from_the_log(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    checkpoint.save(tmp_path / "target" / loop.NEWEST, {"a": torch.ones(2)}, {}, checkpoint.Progress())
    lines = [json.dumps({"tokens": 4096 * i, "loss": 8.0 - i}) for i in range(5)]
    (tmp_path / "target" / "log.jsonl").write_text("\n".join(lines))
    card.plot(tmp_path, tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_pair_fits_its_budget() -> None:
    assert embedded.TARGET.n_layers >= 12
    assert 5e6 <= embedded.TARGET.n_parameters() <= 10e6
    assert embedded.DRAFT.n_layers <= 2
    assert 2 * (embedded.TARGET.n_parameters() + embedded.DRAFT.n_parameters()) < 20e6
