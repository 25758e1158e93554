"""The reference executor: every model, on CPU and CUDA, through torch.

On CPU the decoder's linear layers are packed for oneDNN and its row-wise maths, attention and sampling noise run in
C; without a compiler, or for shapes those kernels do not cover, plain torch does the same and ``caps.notes`` says so.

Shapes: T rows, R outputs, M model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError, IntegrityError, ResourceError
from tenon.base.machine import free_memory
from tenon.engine.config import EngineConfig
from tenon.engine.executors import native
from tenon.engine.executors.attention import Attention, NativeAttention, TorchAttention, supports_native
from tenon.engine.executors.base import Caps, Ticket
from tenon.engine.executors.linear import in_tiles, prepare
from tenon.engine.sampling import sample_rows
from tenon.engine.step import HIDDEN, SAMPLE, Step, StepResult
from tenon.models import rope
from tenon.models.checkpoint import load_decoder, random_decoder
from tenon.models.decoder import Decoder, Maths
from tenon.models.hf_config import read_config
from tenon.models.ops import experts
from tenon.models.spec import KVGroup, ModelSpec

log = logging.getLogger("tenon.engine")
OnPhase = Callable[[str, float, str], None]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCRATCH_BYTES: Final = 256 * 2**20
"""Left free beside the cache for a step's activations."""


class _Positions:
    """Cosines and sines of all positions, computed once: a row's rotation depends on its position alone."""

    def __init__(self, model: Decoder, n: int) -> None:
        inv = model.inv_freq
        self.cos, self.sin = rope.cos_sin(torch.arange(n, device=inv.device), inv, model.rope_factor)

    def cos_sin(self, pos_T: Tensor, inv_D2: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return self.cos.index_select(0, pos_T), self.sin.index_select(0, pos_T)


def _tiled_experts(x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The mixture with each expert's rows in fixed tiles, each row's sum in the order of its own experts."""
    out_TM = torch.zeros_like(x_TM)
    for expert in torch.unique(expert_TK).tolist():
        row, slot = torch.where(expert_TK == expert)

        def product(tile: Tensor, expert: int = expert) -> Tensor:
            gate, up = torch.nn.functional.linear(tile, gate_up[expert]).chunk(2, dim=-1)
            return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])

        out_TM[row] += in_tiles(product, x_TM[row]) * weight_TK[row, slot, None]
    return out_TM


class TorchExecutor:
    """See the module's docstring. One model, one device; ``submit`` computes at once on CPU."""

    def __init__(self, model: Decoder, config: EngineConfig, *, on_phase: OnPhase, clock: Clock = SYSTEM) -> None:
        self.spec: ModelSpec = model.spec
        self._config, self._clock = config, clock
        self._dtype = model.embed.weight.dtype
        self._device = model.embed.weight.device
        self._invariant = config.numerics == "invariant"
        self._notes: list[str] = []
        if config.threads is not None and config.threads != torch.get_num_threads():
            torch.set_num_threads(config.threads)
        self._native = self._load_native(on_phase)
        covered = self._native is not None and supports_native(self.spec, self._dtype, native.HEAD_MULTIPLE)
        self._attention: Attention
        if self._native is not None and covered:
            self._attention = NativeAttention(self.spec, self._dtype, self._native)
        else:
            if self._native is not None:
                shape = f"head size {self.spec.head_dim} with {self._dtype}"
                self._note(f"attention runs in torch, by gathering: the C kernel does not cover {shape}")
            if self._invariant:
                raise ConfigError(
                    "numerics 'invariant' needs the attention kernel (CPU, a C compiler, head sizes in multiples of "
                    f"{native.HEAD_MULTIPLE}); use numerics 'fast'",
                    subject="numerics",
                )
            self._attention = TorchAttention(self.spec, self._dtype, self._device)
        self._install(model, on_phase)
        self._last: dict[int, int] = {}
        self._results: dict[Ticket, StepResult] = {}

    @classmethod
    def load(
        cls, folder: Path, spec: ModelSpec, config: EngineConfig, on_phase: OnPhase, clock: Clock = SYSTEM
    ) -> TorchExecutor:
        """Weights from a checkpoint's folder. Raises ``CheckpointError``, ``ConfigError``, ``ResourceError``."""
        device = cls._choose_device(config.device)
        dtype = config.dtype if config.dtype != "auto" else spec.dtype
        if dtype == "float16" and device == "cpu":
            if config.dtype == "float16":
                raise ConfigError("dtype 'float16' is not served on CPU; use bfloat16 or float32", subject="dtype")
            dtype = "bfloat16"
        on_phase("weights", 0.0, str(folder))
        if config.weights_seed is None:
            model = load_decoder(folder, DTYPES[dtype], device)
        else:
            model = random_decoder(spec, config.weights_seed, DTYPES[dtype]).to(device)
        on_phase("weights", 1.0, f"{spec.n_parameters() / 1e6:.1f} M parameters as {dtype}")
        return cls(model, config, on_phase=on_phase, clock=clock)

    @staticmethod
    def _choose_device(wanted: str) -> str:
        if wanted == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ConfigError(f"device must be auto, cpu or cuda[:N], got {wanted!r}", subject="device") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device", subject="device")
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda[:N], got {wanted!r}", subject="device")
        return wanted

    def _note(self, text: str) -> None:
        self._notes.append(text)
        log.warning(text)

    def _load_native(self, on_phase: OnPhase) -> native.Native | None:
        if self._device.type != "cpu":
            return None
        on_phase("kernels", 0.0, "compiling C kernels (once per machine)")
        try:
            loaded = native.load()
        except ResourceError as error:
            self._note(f"C kernels are missing, so steps are slower: {error}")
            return None
        on_phase("kernels", 1.0, "C kernels")
        return loaded

    def _install(self, model: Decoder, on_phase: OnPhase) -> None:
        """Take over a decoder: pack its layers, choose its maths."""
        model.eval().requires_grad_(False)
        pack = self._device.type == "cpu" and self._dtype in native.SUFFIX
        prepare(
            model, pack=pack, tiled=self._invariant, on_layer=lambda i, n: on_phase("pack", i / n, f"{i} of {n} layers")
        )
        covered = self._native is not None and self._dtype in native.SUFFIX
        maths = native.NativeMaths(self._native, self._dtype) if self._native is not None and covered else Maths()
        length = min(self._config.max_model_len or self.spec.max_position, self.spec.max_position)
        maths.cos_sin = _Positions(model, length).cos_sin  # type: ignore[method-assign]
        maths.experts = _tiled_experts if self._invariant else experts  # type: ignore[method-assign]
        self.model, self._maths = model, maths

    @property
    def caps(self) -> Caps:
        dtype = str(self._dtype).removeprefix("torch.")
        return Caps("torch", str(self._device), dtype, True, True, self._invariant, tuple(self._notes))

    def free_bytes(self) -> int:
        """Memory that a cache could take on this executor's device."""
        if self._device.type == "cuda":
            return max(0, torch.cuda.mem_get_info(self._device)[0] - SCRATCH_BYTES)
        return max(0, free_memory() - SCRATCH_BYTES)

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self._attention.allocate(groups, n_blocks)

    @torch.inference_mode()
    def hidden(self, step: Step) -> Tensor:
        """The step's last hidden states (T, M): every layer's K and V are in the cache afterwards."""
        tok = step.tok
        if (tok < 0).any():
            span = np.repeat(np.arange(len(step.seq)), np.diff(step.q_start))
            tok = tok.copy()
            for row in np.flatnonzero(tok < 0):
                tok[row] = self._last[int(step.seq[span[row]])]
        self._attention.begin(step)
        tok_T = torch.from_numpy(tok.astype(np.int64)).to(self._device)
        pos_T = torch.from_numpy(step.pos.astype(np.int64)).to(self._device)
        return self.model.hidden(tok_T, pos_T, self._attention.attend, self._maths)

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """Logits (R, V) of the step's outputs, in the model's type; distinct rows are computed once."""
        rows, back = np.unique(step.out_row, return_inverse=True)
        hidden_TM = self.hidden(step)
        self._wanted = hidden_TM[torch.from_numpy(rows.astype(np.int64)).to(self._device)]
        # Decoding rows are all sampled, and sampling finds what is not finite; a chunk's rows are looked at here.
        self._spoilt = self._not_finite(step, hidden_TM) if step.n_rows > len(rows) else []
        if not len(rows):
            return hidden_TM.new_zeros((0, self.spec.vocab_size))
        logits = self.model.logits(self._wanted)
        in_order = (np.diff(back) == 1).all()
        return logits if in_order else logits[torch.from_numpy(back).to(self._device)]

    @staticmethod
    def _not_finite(step: Step, hidden_TM: Tensor) -> list[int]:
        """Sequences with a row that is not finite: what they wrote must not be offered to others, sampled or not."""
        rows = np.flatnonzero(~torch.isfinite(hidden_TM).all(-1).cpu().numpy())
        spans = np.searchsorted(step.q_start, rows, side="right") - 1
        return np.unique(step.seq[spans]).tolist()

    def submit(self, step: Step) -> Ticket:
        start_s = self._clock.now_s()
        logits_RV = self.logits(step)
        result = self._sample(step, logits_RV)
        for seq in self._spoilt:
            result.errors.setdefault(seq, "a hidden state is not finite")
        hidden = np.flatnonzero(step.want & HIDDEN)
        if len(hidden):
            rows = np.unique(step.out_row, return_inverse=True)[1][hidden]
            result.hidden = self._wanted[torch.from_numpy(rows)].float().cpu().numpy()
        self._last = dict(zip(step.out_seq.tolist(), result.ids.tolist(), strict=True))
        result.start_s, result.end_s = start_s, self._clock.now_s()
        ticket = Ticket(step.id)
        self._results[ticket] = result
        return ticket

    @torch.inference_mode()
    def _sample(self, step: Step, logits_RV: Tensor) -> StepResult:
        """Tokens of the outputs; rows that are greedy and plain never leave the device as logits."""
        greedy = self._greedy(logits_RV)
        temperature = step.params.temperature[step.params_index]
        plain = (temperature == 0) & (step.want == SAMPLE) & (step.params.n_logprobs[step.params_index] < 0)
        on_device = plain.all() and (step.bitmask_index < 0).all() and not len(step.edit_token)
        if on_device and (greedy >= 0).all():
            host = np.zeros((step.n_outputs, 0), np.float32)
        else:
            host = logits_RV.float().cpu().numpy()
        noise, fast = (self._native.noise, self._native.choose) if self._native is not None else (None, None)
        return sample_rows(step, host, noise, greedy, fast)

    def _greedy(self, logits_RV: Tensor) -> NDArray[np.int64]:
        """(R,) best ids; -1 where a row has no finite value or a NaN."""
        if self._native is not None and logits_RV.dtype in native.SUFFIX and logits_RV.is_contiguous():
            return self._native.argmax(logits_RV)
        if not len(logits_RV):
            return np.zeros(0, np.int64)
        best, ids = logits_RV.max(-1)
        return torch.where(torch.isfinite(best), ids, -1).cpu().numpy()

    def poll(self, ticket: Ticket) -> StepResult:
        return self._results.pop(ticket)

    def load_weights(self, path: str, version: int) -> None:
        """The same shapes with other weights; the old ones serve on if loading fails."""
        spec = read_config(Path(path))
        if spec != self.spec:
            raise ConfigError(f"{path} has other shapes than the model being served; restart to serve it", subject=path)
        self._install(load_decoder(Path(path), self._dtype, str(self._device)), lambda *_: None)

    def close(self) -> None:
        if self._results:
            raise IntegrityError(f"{len(self._results)} submitted steps were never polled")
        del self.model
