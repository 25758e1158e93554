"""What a chunk policy is shown of the scheduler's sequences, and what it is told of steps that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tenon.base.errors import ConfigError
from tenon.cost import calibration
from tenon.cost.price import seconds
from tenon.cost.work import StepShape, decode_shape, step_shape
from tenon.engine.config import EngineConfig
from tenon.engine.policies.chunk import (
    CHUNKS,
    Chunk,
    Corrected,
    Learned,
    Limits,
    Load,
    Promised,
    Run,
    StepSeconds,
)
from tenon.engine.policies.order import PATIENCE_S
from tenon.engine.sequence import Seq
from tenon.engine.speculation.asked import claims_of
from tenon.engine.step import Step
from tenon.models.spec import CostShape, KVGroup, ModelSpec, step_work

if TYPE_CHECKING:
    from tenon.engine.forecasts import Forecasts


def _due_s(seq: Seq) -> float:
    """When its first token is."""
    slo, account = seq.request.add.slo, seq.account
    patience_s = PATIENCE_S if slo is None or slo.ttft_s is None else slo.ttft_s
    return patience_s + (0.0 if account is None else account.received_s)


class Chunks:
    """The rows of each step, by the config's policy. With ``chunk="fixed"`` nothing is looked at."""

    def __init__(
        self,
        config: EngineConfig,
        groups: Sequence[KVGroup],
        step_s: StepSeconds | None = None,
        policy: Chunk | None = None,
    ) -> None:
        """``step_s`` predicts steps; without it they are learned as they are measured. ``policy`` is asked instead of
        the config's."""
        self._most = most = config.max_step_tokens
        self._slots = config.max_sequences
        self._windows = tuple(group.window for group in groups)
        target_s = float("inf") if config.tpot_ms is None else config.tpot_ms / 1e3
        limits = Limits(min(config.min_chunk_tokens, most), most, target_s)
        model = Learned() if step_s is None else Corrected(step_s)
        self.policy = policy if policy is not None else CHUNKS[config.chunk](limits, model)
        self._is_fixed, self._is_patient = config.chunk == "fixed", config.chunk == "patient"
        self.chosen = 0
        """What the policy chose for the step that was scheduled last; 0 where it was not asked."""

    def budget(
        self,
        decodes: Sequence[Seq],
        prefills: Sequence[Seq],
        waiting: Sequence[Seq],
        now_s: float = 0.0,
        forecasts: Forecasts | None = None,
    ) -> int:
        """Rows of a step in which ``decodes`` have one each: all others are for prompts. The step begins at ``now_s``;
        ``forecasts`` say what it may take, for a policy that goes by what is promised.

        There is always room for one of them as long as the step has it, so who can come in does not depend on this.
        """
        self.chosen = 0
        most = self._most
        if self._is_fixed or not decodes or not (prefills or (waiting and len(decodes) < min(self._slots, most))):
            return most
        seen = np.fromiter((seq.n_computed + 1 for seq in decodes), np.int64, len(decodes))
        promised = None
        if forecasts is not None and self._is_patient:
            n = len(decodes)
            promised = Promised(
                claims_of(decodes, now_s),
                forecasts.usual.per_step,
                lambda rows: forecasts.step_s(n, rows),
                [(_due_s(seq) - now_s, seq.n_tokens - seq.n_computed) for seq in (*prefills, *waiting[: self._slots])],
            )
        load = Load(decode_shape(seen, self._windows), self._runs(prefills, waiting), self._windows, promised)
        self.chosen = self.policy.choose(load)
        return min(most, len(decodes) + self.chosen)

    def _runs(self, prefills: Sequence[Seq], waiting: Sequence[Seq]) -> Iterator[Run]:
        """What a step could compute of prompts, in its order.

        What of a newcomer's prompt is resident is not known before it comes in: its rows are taken to be its last ones,
        which cost most. That is its first step only.
        """
        left = self._most
        for seq in prefills:
            for start, n in seq.runs(left):
                yield start, n, len(seq.heirs) if start + n == seq.n_tokens else 0
                left -= n
            if left == 0:
                return
        for seq in waiting:
            n = min(left, seq.n_tokens)
            yield seq.n_tokens - n, n, len(seq.heirs)
            left -= n
            if left == 0:
                return

    def measured(self, step: Step, taken_s: float) -> None:
        """The step took so long: scheduling it, computing it and taking it over, as one waits between two tokens."""
        model = self.policy.model
        if model is not None and (model.every_step or step.n_rows > len(step.seq)):
            model.tell(step_shape(step.pos, step.q_start, step.n_outputs, self._windows, step.parent), taken_s)


@dataclass(frozen=True)
class Predictor:
    """Predicted seconds of a step, or None where they have to be learned; and a sentence on which it is, and why."""

    step_s: StepSeconds | None
    note: str


def predictor(spec: ModelSpec | CostShape, dtype: str, device: str) -> Predictor:
    """By this machine's calibration, if there is one for the kind of ``device`` ("cpu", "cuda:0") and for ``dtype``."""
    try:
        local = calibration.load().device()
        local.peak(dtype)
    except ConfigError as error:
        return Predictor(None, f"chunks go by measured steps alone: {error}")
    kind = "cpu" if device == "cpu" else "gpu"
    if local.kind != kind:
        return Predictor(None, f"chunks go by measured steps alone: the {local.kind} is calibrated, not the {kind}")

    def step_s(shape: StepShape) -> float:
        return seconds(step_work(spec, shape, dtype), local)

    return Predictor(step_s, f"chunks go by this machine's calibration, {local.title}, corrected by measured steps")
