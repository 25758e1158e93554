"""Muon for matrices, AdamW for the rest, and their state as named tensors.

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix; its step is scaled to AdamW's root
mean square (Liu et al. 2025), so one order of magnitude of learning rate suits both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenon.base.errors import CheckpointError
from tenon.models.decoder import Decoder


@dataclass(frozen=True)
class Rates:
    """Peak learning rates and the decay of the matrices' weights (times the rate, per iteration)."""

    matrix: float = 4e-3
    vector: float = 3e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip_norm: float = 1.0


class Optimizers:
    """Both optimizers as one; ``scale`` is the schedule's factor."""

    def __init__(self, model: Decoder, rates: Rates) -> None:
        self.rates = rates
        named = dict(model.named_parameters())
        self.matrix_names = [n for n, p in named.items() if p.ndim == 2 and not n.startswith(("embed", "lm_head"))]
        self.vector_names = [n for n in named if n not in self.matrix_names]
        self.parameters = list(named.values())
        self.muon = torch.optim.Muon(
            [named[n] for n in self.matrix_names],
            lr=rates.matrix,
            momentum=rates.momentum,
            weight_decay=rates.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adam = torch.optim.AdamW(
            [named[n] for n in self.vector_names], lr=rates.vector, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, factor: float) -> float:
        """Clip, step both at ``factor`` of their peak rates, clear the gradients; returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.rates.clip_norm)
        for optimizer, rate in ((self.muon, self.rates.matrix), (self.adam, self.rates.vector)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _parts(self) -> Iterable[tuple[torch.optim.Optimizer, list[str]]]:
        return ((self.muon, self.matrix_names), (self.adam, self.vector_names))

    def tensors(self) -> dict[str, Tensor]:
        """All state, named ``parameter::slot``."""
        found: dict[str, Tensor] = {}
        for optimizer, names in self._parts():
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    found[f"{names[index]}::{slot}"] = value
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave. Raises ``CheckpointError`` for a parameter that is not there."""
        for optimizer, names in self._parts():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                name, slot = key.split("::")
                if name in names:
                    state.setdefault(names.index(name), {})[slot] = value
            missing = [n for i, n in enumerate(names) if i not in state]
            if tensors and missing:
                raise CheckpointError(f"the optimizer's state lacks {missing[0]}.", subject=missing[0])
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
