"""The reference executor: every model, on CPU and CUDA, through torch.

On CPU the decoder's layers run as one C call (``stack.py``), and sampling noise in C; without a compiler, or for shapes
those kernels do not cover, plain torch does the same and ``caps.notes`` says so. On CUDA attention is one Triton launch
for all spans of a step (``triton_attention.py``); without Triton it gathers, and ``caps.notes`` says that.

Shapes: T rows, R outputs, M model width, V vocabulary.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenon.base.clock import SYSTEM, Clock
from tenon.base.errors import ConfigError, IntegrityError, ResourceError
from tenon.base.machine import free_memory
from tenon.engine.config import EngineConfig
from tenon.engine.executors import native
from tenon.engine.executors.attention import NativeAttention, TorchAttention
from tenon.engine.executors.base import Caps, Ticket
from tenon.engine.executors.stack import HEAD_MULTIPLE, Stack, uncovered
from tenon.engine.sampling import REFUSED, UNKNOWN, draft_rows, is_plain, look_up, needs_logits, sample_rows
from tenon.engine.step import DRAFT, HIDDEN, SCORE, Step, StepResult
from tenon.models import rope
from tenon.models.checkpoint import load_decoder, random_decoder
from tenon.models.decoder import Decoder, Maths
from tenon.models.hf_config import read_config
from tenon.models.spec import KVGroup, ModelSpec

log = logging.getLogger("tenon.engine")
OnPhase = Callable[[str, float, str], None]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCRATCH_BYTES: Final = 256 * 2**20
"""Left free beside the cache for a step's activations."""


NO_STEP: Final = -1
"""The ``id`` of none."""
SCORED_AT_ONCE: Final = 64
"""Rows of a prompt whose logits are held at the same time."""


def _n_sampled(step: Step) -> int:
    """Outputs whose logits are wanted together; they come first."""
    return int(np.count_nonzero((step.want != SCORE) & (step.want != HIDDEN)))


class Forward(Protocol):
    """A decoder's forward pass over the attention's current step."""

    def hidden(self, tok_T: Tensor, pos_T: Tensor) -> Tensor:
        """Last hidden states (T, M): every layer's K and V are in the cache afterwards."""
        ...

    def logits(self, hidden_RM: Tensor) -> Tensor:
        """Scores over the vocabulary (R, V) in the model's type."""
        ...


class Reference:
    """The decoder as it is written, on any device."""

    def __init__(self, model: Decoder, attention: TorchAttention, max_position: int) -> None:
        self.model, self._attention = model, attention
        inv = model.inv_freq
        self._cos, self._sin = rope.cos_sin(torch.arange(max_position, device=inv.device), inv, model.rope_factor)
        self._maths = Maths()
        self._maths.cos_sin = self._cos_sin  # type: ignore[method-assign]

    def _cos_sin(self, pos_T: Tensor, inv_D2: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Looked up: all positions' are computed once."""
        return self._cos.index_select(0, pos_T), self._sin.index_select(0, pos_T)

    def hidden(self, tok_T: Tensor, pos_T: Tensor) -> Tensor:
        return self.model.hidden(tok_T, pos_T, self._attention.attend, self._maths)

    def logits(self, hidden_RM: Tensor) -> Tensor:
        return self.model.logits(hidden_RM)


class TorchExecutor:
    """See the module's docstring. One model, one device; ``submit`` computes at once on CPU."""

    def __init__(self, model: Decoder, config: EngineConfig, *, on_phase: OnPhase, clock: Clock = SYSTEM) -> None:
        self.spec: ModelSpec = model.spec
        self.has_head = model.has_head
        self._config, self._clock = config, clock
        self._dtype = model.embed.weight.dtype
        self._device = model.embed.weight.device
        self._notes: list[str] = []
        if config.threads is not None and config.threads != torch.get_num_threads():
            torch.set_num_threads(config.threads)
        self._native = self._load_native(on_phase)
        self._attention: NativeAttention | TorchAttention
        if self._native is not None and (why := uncovered(self.spec, self._dtype)) is None:
            self._attention = NativeAttention(self.spec, self._dtype, self._native)
        else:
            if self._native is not None:
                self._note(f"the model runs in torch, which is slower: the C kernels do not cover {why}")
            if config.numerics == "invariant":
                raise ConfigError(
                    "numerics 'invariant' needs the C kernels (CPU, a C compiler, head sizes in multiples of "
                    f"{HEAD_MULTIPLE}); use numerics 'fast'",
                    subject="numerics",
                )
            self._attention = self._torch_attention()
        self._install(model, on_phase)
        self._last: dict[int, int] = {}
        self._moved = NO_STEP
        """The last step whose moves were made."""
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

    def _torch_attention(self) -> TorchAttention:
        """One launch a step on CUDA where Triton works and covers the model; gathering elsewhere."""
        if self._device.type == "cuda":
            try:
                # Here, for Triton may be missing, and on CPU nobody needs it.
                from tenon.engine.executors import triton_attention as triton

                if (why := triton.uncovered(self.spec, self._dtype)) is None:
                    attention = triton.TritonAttention(self.spec, self._dtype, self._device)
                    attention.compile()
                    return attention
                why = f"the Triton kernels do not cover {why}"
            except ImportError as error:
                why = f"Triton cannot be imported ({error})"
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                why = f"Triton cannot compile ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            self._note(f"attention gathers every context, which is slower: {why}")
        return TorchAttention(self.spec, self._dtype, self._device)

    def _install(self, model: Decoder, on_phase: OnPhase) -> None:
        """Take over a decoder, in the form that suits the attention."""
        model.eval().requires_grad_(False)
        length = min(self._config.max_model_len or self.spec.max_position, self.spec.max_position)
        self.forward: Forward
        if isinstance(self._attention, TorchAttention):
            self.forward = Reference(model, self._attention, length)
            return
        if self._native is None:
            raise IntegrityError("attention in C was chosen without its kernels")

        def packed(i: int, n: int) -> None:
            on_phase("pack", i / n, f"{i} of {n} layers")

        self.forward = Stack(model, self._native, self._attention, length, packed)

    @property
    def caps(self) -> Caps:
        dtype = str(self._dtype).removeprefix("torch.")
        return Caps("torch", str(self._device), dtype, True, True, isinstance(self.forward, Stack), tuple(self._notes))

    def free_bytes(self) -> int:
        """Memory that a cache could take on this executor's device."""
        if self._device.type == "cuda":
            return max(0, torch.cuda.mem_get_info(self._device)[0] - SCRATCH_BYTES)
        return max(0, free_memory() - SCRATCH_BYTES)

    def allocate(self, groups: tuple[KVGroup, ...], n_blocks: int) -> None:
        self._moved = NO_STEP
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
        if step.id == self._moved:
            step = step.without_moves()
        self._attention.begin(step)
        if step.has_moves:
            self._moved = step.id
        tok_T = torch.from_numpy(tok.astype(np.int64)).to(self._device)
        pos_T = torch.from_numpy(step.pos.astype(np.int64)).to(self._device)
        return self.forward.hidden(tok_T, pos_T)

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """Logits (R, V) of the step's outputs, save those that are only scored and those whose hidden states alone are
        wanted, in the model's type; distinct rows are computed once."""
        self._hidden = hidden_TM = self.hidden(step)
        back = None
        out_row = step.out_row[: _n_sampled(step)]
        if len(out_row) == step.n_rows and (np.diff(out_row) == 1).all():
            wanted = hidden_TM  # decoding: every row is an output, in order
        else:
            rows, back = np.unique(out_row, return_inverse=True)
            wanted = hidden_TM[torch.from_numpy(rows.astype(np.int64)).to(self._device)]
            if len(rows) == len(out_row) and (np.diff(back) == 1).all():
                back = None
        # Decoding rows are all sampled, and sampling finds what is not finite; a chunk's rows are looked at here.
        self._spoilt = self._not_finite(step, hidden_TM) if step.n_rows > len(wanted) else []
        if not len(out_row):
            return hidden_TM.new_zeros((0, self.spec.vocab_size))
        logits = self.forward.logits(wanted)
        return logits if back is None else logits[torch.from_numpy(back).to(self._device)]

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
        self._score(step, result)
        n = _n_sampled(step)
        for seq in self._spoilt:
            result.errors.setdefault(seq, "a hidden state is not finite")
        hidden = step.out_row[(step.want & HIDDEN) > 0].astype(np.int64)
        if len(hidden):
            result.hidden = self._hidden[torch.from_numpy(hidden).to(self._device)].float().cpu().numpy()
        self._last = dict(zip(step.out_seq[:n].tolist(), result.ids[:n].tolist(), strict=True))
        result.start_s, result.end_s = start_s, self._clock.now_s()
        ticket = Ticket(step.id)
        self._results[ticket] = result
        return ticket

    @torch.inference_mode()
    def _sample(self, step: Step, logits_RV: Tensor) -> StepResult:
        """Tokens of the outputs; rows of which no more is needed never leave the device as logits."""
        noise = self._native.noise if self._native is not None else None
        if len(step.want) and step.want[0] & DRAFT:
            best = self._native.best if self._native is not None else None
            return draft_rows(step, logits_RV.float().cpu().numpy(), noise, best)
        found_R = self._find(step, logits_RV)
        n = len(found_R)
        host = logits_RV.float().cpu().numpy() if needs_logits(step, found_R).any() else np.zeros((n, 0), np.float32)
        return sample_rows(step, host, noise, found_R)

    def _find(self, step: Step, logits_RV: Tensor) -> NDArray[np.int64]:
        """(R,) tokens of outputs that are sampled plainly, as far as this device can; REFUSED, UNKNOWN, WRONG."""
        n = len(logits_RV)
        plain_R = is_plain(step, n)
        if self._native is not None and logits_RV.dtype in native.SUFFIX and logits_RV.is_contiguous():
            return self._native.sample(logits_RV, native.draws(step, n), plain_R)
        greedy_R = plain_R & (step.params.temperature[step.params_index[:n]] == 0)
        if not greedy_R.any():
            return np.full(n, UNKNOWN)
        best, ids = logits_RV.max(-1)
        found_R = torch.where(torch.isfinite(best), ids, REFUSED).cpu().numpy()
        return np.where(greedy_R, found_R, UNKNOWN)

    @torch.inference_mode()
    def _score(self, step: Step, result: StepResult) -> None:
        """Outputs that are only scored, a few at a time: a prompt's logits may be larger than its keys and values."""
        end = step.n_outputs - int(np.count_nonzero(step.want == HIDDEN))
        for at in range(_n_sampled(step), end, SCORED_AT_ONCE):
            outputs = range(at, min(at + SCORED_AT_ONCE, end))
            rows = torch.from_numpy(step.out_row[outputs.start : outputs.stop].astype(np.int64)).to(self._device)
            logits_RV = self.forward.logits(self._hidden[rows]).float().cpu().numpy()
            for r, logits_V in zip(outputs, logits_RV, strict=True):
                look_up(step, result, r, logits_V)

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
        del self.forward
