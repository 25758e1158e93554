"""The training loop: rows, gradient, step, record, and a state that resumes to the same bits.

    weights, cursor, optimizer  --run-->  one more iteration  --save-->  state.safetensors

An ``Objective`` turns a batch into a loss with its gradient; the loop knows neither text nor teachers. The
schedule may be moved between sittings as long as its decay has not begun: the state before the decay is
kept beside the newest one, so that a later sitting can go on from it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from tenon.base import clock, files
from tenon.base.errors import CheckpointError
from tenon.models.decoder import Decoder
from tenon.training import checkpoint
from tenon.training.checkpoint import Progress
from tenon.training.optimizers import Optimizers, Rates
from tenon.training.rows import Cursor
from tenon.training.schedule import Wsd

Objective = Callable[[Decoder, Cursor, int], tuple[float, Cursor]]
"""(model, cursor, iteration) -> (mean loss in nats per token, next cursor); gradients are left in the model."""

NEWEST, STABLE = "state.safetensors", "stable.safetensors"


@dataclass(frozen=True)
class LoopConfig:
    """What one run is made of, beside its objective. ``save_every_s`` counts the thread's CPU seconds."""

    schedule: Wsd
    batch_tokens: int
    rates: Rates = Rates()
    save_every_s: float = 300.0
    log_every: int = 10


@dataclass(frozen=True)
class Report:
    """One line of the record: means since the line before."""

    iteration: int
    tokens: int
    loss: float
    factor: float
    norm: float
    cpu_s: float


def keep_heap() -> None:
    """Tell glibc to keep freed memory: on a CPU fresh pages cost more than the maths done in them.

    Elsewhere (no ``mallopt``) nothing changes but the speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold, top_pad = -4, -1, -2
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


class Run:
    """A model in training and the folder that holds its state."""

    def __init__(self, model: Decoder, config: LoopConfig, folder: Path) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.optimizers = Optimizers(model, config.rates)
        self.progress = Progress()

    def resume(self, name: str = NEWEST) -> bool:
        """Take up the state in ``folder`` if there is one; returns whether there was."""
        path = self.folder / name
        if not path.is_file():
            return False
        loaded, optimizer, self.progress = checkpoint.load(path)
        set_weights(self.model, loaded)
        self.optimizers.load(optimizer)
        self._forget_later_reports()
        return True

    def _forget_later_reports(self) -> None:
        """Drop what a killed run logged after its last save: those iterations will run, and report, again."""
        log = self.folder / "log.jsonl"
        if log.is_file():
            lines = log.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["iteration"] <= self.progress.iteration]
            files.write_text(log, "".join(f"{line}\n" for line in kept))

    def save(self, name: str = NEWEST) -> None:
        checkpoint.save(self.folder / name, weights(self.model), self.optimizers.tensors(), self.progress)

    def iterate(self, objective: Objective) -> tuple[float, float, float]:
        """One iteration; returns its loss, the schedule's factor and the gradient's norm."""
        started = clock.thread_cpu_s()
        done = self.progress
        factor = self.config.schedule.factor(done.iteration)
        loss, cursor = objective(self.model, done.cursor, done.iteration)
        norm = self.optimizers.step(factor)
        cpu_s = done.cpu_s + clock.thread_cpu_s() - started
        self.progress = Progress(done.iteration + 1, done.tokens + self.config.batch_tokens, cpu_s, cursor)
        return loss, factor, norm

    def run(self, objective: Objective, on_report: Callable[[Report], None] | None = None) -> bool:
        """Iterate until the schedule stops, or SIGTERM or SIGINT asks to; saves either way.

        Returns whether the schedule was completed. Appends reports to ``log.jsonl``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder.parent / "pid").write_text(f"{os.getpid()}\n")
        asked: list[int] = []

        def ask(number: int, frame: FrameType | None) -> None:
            asked.append(number)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        saved_s = clock.thread_cpu_s()
        sums = [0.0, 0.0, 0]
        schedule = self.config.schedule
        try:
            with (self.folder / "log.jsonl").open("a") as log:
                while self.progress.iteration < schedule.stop and not asked:
                    if self.progress.iteration == schedule.decay_at:
                        self.save(STABLE)
                    loss, factor, norm = self.iterate(objective)
                    sums = [sums[0] + loss, sums[1] + norm, sums[2] + 1]
                    if self.progress.iteration % self.config.log_every == 0:
                        p, n = self.progress, sums[2]
                        report = Report(p.iteration, p.tokens, sums[0] / n, factor, sums[1] / n, p.cpu_s)
                        log.write(json.dumps(report.__dict__) + "\n")
                        log.flush()
                        sums = [0.0, 0.0, 0]
                        if on_report is not None:
                            on_report(report)
                    if clock.thread_cpu_s() - saved_s > self.config.save_every_s:
                        self.save()
                        saved_s = clock.thread_cpu_s()
            self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.progress.iteration >= schedule.stop


def weights(model: Decoder) -> dict[str, Tensor]:
    """The model's tensors by name, a tied output layer left out."""
    tied = model.spec.tie_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def set_weights(model: Decoder, tensors: dict[str, Tensor]) -> None:
    """Copy what :func:`weights` gave into ``model``. Raises ``CheckpointError`` when names differ."""
    if odd := sorted(set(weights(model)) ^ set(tensors)):
        raise CheckpointError(f"the state does not fit this model: {odd[0]} is in one of them only.", subject=odd[0])
    model.load_state_dict(tensors, strict=False)


def inherit(model: Decoder, source: Decoder, n_layers: int) -> None:
    """Give ``model`` the embedding, the final norm and the first ``n_layers`` layers of ``source``, of equal width."""
    with torch.no_grad():
        model.embed.weight.copy_(source.embed.weight)
        model.norm.weight.copy_(source.norm.weight)
        for mine, theirs in zip(model.layers[:n_layers], source.layers[:n_layers], strict=True):
            mine.load_state_dict(theirs.state_dict())


def initialise(model: Decoder, seed: int) -> None:
    """Normal weights of one over the square root of their inputs; what adds to the residual stream starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                p.fill_(1.0)
            elif name.startswith(("embed", "lm_head")):
                p.normal_(0.0, 0.02, generator=generator)
            elif name.endswith(("out.weight", "mlp.down.weight")):
                p.zero_()
            else:
                p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
