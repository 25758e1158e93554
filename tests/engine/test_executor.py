"""The torch executor's own duties: types and devices, replacing weights, what else a step may ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tenon.base.errors import CheckpointError, ConfigError, IntegrityError
from tenon.engine.build import build_engine
from tenon.engine.config import EngineConfig
from tenon.engine.executors.isolated import Isolated
from tenon.engine.executors.torch import TorchExecutor
from tenon.engine.messages import Add
from tenon.engine.step import HIDDEN, SAMPLE, SCORE
from tests.engine.build import Lab, Labs, chain, errors, fresh, run, sequence, step
from tests.models import zoo

pytestmark = pytest.mark.torch


def load(folder: Path, **config: object) -> TorchExecutor:
    settings = EngineConfig(model=str(folder), **config)  # type: ignore[arg-type]
    isolated = build_engine(settings, lambda *_: None).executor
    assert isinstance(isolated, Isolated)
    assert isinstance(isolated.inner, TorchExecutor)
    return isolated.inner


def test_an_engine_is_built_from_a_folder_and_tells_its_phases(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lab("qwen3").folder
    monkeypatch.setenv("TENON_STATE", str(folder / "state"))
    phases: list[str] = []
    made = build_engine(EngineConfig(model=str(folder), kv_bytes=2**20), lambda name, *_: phases.append(name))
    assert list(dict.fromkeys(phases))[:2] == ["config", "weights"]
    assert {"config", "weights", "kernels", "pack", "memory"} <= set(phases)
    assert len(run(made, [Add("a", (5, 6, 7), 4, 0)])["a", 0]) == 4
    ready = made.ready()
    assert ready.vocab_size == zoo.VOCAB
    assert ready.description["dtype"] == "float32"
    made.close()


def test_replaced_weights_are_those_of_the_other_checkpoint(lab: Labs, tmp_path: Path) -> None:
    name, a = "llama-tied-llama3", sequence(1, 20)
    first = Lab(name, "fp32", tmp_path / "first", None)
    other = zoo.checkpoint(name, tmp_path / "other", seed=9)
    fresh(first)
    before = first.executor.logits(step([chain(first, 0, a, 0, 20)]))
    first.executor.load_weights(str(other), 1)
    after = first.executor.logits(step([chain(first, 0, a, 0, 20)]))
    with torch.inference_mode():
        right = zoo.load_reference(other, torch.float64)(torch.tensor([a])).logits[0]
    assert errors(after, right).max() <= 1e-5
    assert errors(before, right).max() > 1e-2


def test_weights_that_cannot_be_loaded_leave_the_old_ones(lab: Labs, tmp_path: Path) -> None:
    it, a = Lab("qwen3", "fp32", tmp_path / "first", 32), sequence(1, 20)
    fresh(it)
    before = it.executor.logits(step([chain(it, 0, a, 0, 20)]))
    broken = zoo.checkpoint("qwen3", tmp_path / "broken", seed=9)
    with pytest.raises(ConfigError, match="other shapes"):
        it.executor.load_weights(str(broken), 1)
    (it.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        it.executor.load_weights(str(it.folder), 1)
    assert torch.equal(it.executor.logits(step([chain(it, 0, a, 0, 20)])), before)


def test_scores_and_hidden_states_come_when_asked_for(lab: Labs) -> None:
    it, a = lab("qwen2"), sequence(2, 12)
    fresh(it)
    made = step([chain(it, 0, a, 0, 12, [10, 4, 11])])
    made.want = np.array([SAMPLE, HIDDEN | SCORE, HIDDEN], np.uint8)
    made.score_start, made.score_token = np.array([0, 0, 2, 2], np.int32), np.array([8, 9], np.int32)
    result = it.executor.poll(it.executor.submit(made))
    right = torch.log_softmax(it.references([tuple(a)])[0], -1)
    assert result.scores == pytest.approx(right[4, [8, 9]].numpy(), abs=1e-4)
    assert result.ids.tolist() == [int(right[10].argmax()), -1, -1]
    assert result.hidden.shape == (2, it.spec.hidden_size)
    again = it.executor.forward.logits(torch.from_numpy(result.hidden))
    assert errors(again, it.references([tuple(a)])[0][[4, 11]]).max() <= 1e-5


def test_a_row_may_go_on_from_the_previous_step_s_sample(lab: Labs) -> None:
    it, a = lab("qwen3"), sequence(3, 12)
    fresh(it)
    result = it.executor.poll(it.executor.submit(step([chain(it, 0, a, 0, 12, [11])])))
    known = [*a, int(result.ids[0])]
    run_on = chain(it, 0, [*a, -1], 12, 13)
    found = it.executor.logits(step([run_on]))
    assert errors(found, it.references([tuple(known)])[0][12:]).max() <= 1e-5


def test_tree_rows_out_of_order_are_refused(lab: Labs) -> None:
    it = lab("qwen3")
    fresh(it)
    run = chain(it, 0, sequence(1, 3), 0, 3)
    run.parent = [1, -1, -1]
    with pytest.raises(IntegrityError, match="must follow its parent"):
        it.executor.logits(step([run]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"device": "meta"}, "device must be auto, cpu or cuda"),
        ({"dtype": "float16", "device": "cpu"}, "not served on CPU"),
    ],
)
def test_types_and_devices_that_are_not_served_are_refused(config: dict[str, str], words: str, lab: Labs) -> None:
    with pytest.raises(ConfigError, match=words):
        load(lab("qwen3").folder, **config)


def test_random_weights_are_the_same_for_the_same_seed(lab: Labs, monkeypatch: pytest.MonkeyPatch) -> None:
    it = lab("qwen3")
    monkeypatch.setenv("TENON_STATE", str(it.folder / "state"))
    made = step([chain(it, 0, sequence(1, 8), 0, 8)])
    one, two, other = (load(it.folder, weights_seed=seed, kv_bytes=2**21).logits(made) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
