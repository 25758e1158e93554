"""How good the pair is: bits per byte against compressors, and how often the draft is right.

The model is judged as a compressor would be: minus log2 of the probability of every token, ends of text
included, over the bytes of the text. Windows slide, so that a token sees at least ``window - stride`` tokens
before it once a text is long enough.

Shapes: S tokens of a window, V vocabulary, N prompts.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tenon.models.decoder import Decoder
from tenon.training.attention import batched
from tenon.training.corpus import Document
from tenon.training.objectives import head, row_hidden
from tenon.training.tokenizer import END_OF_TEXT, special_id


@dataclass(frozen=True)
class Score:
    """One text's size, and bits per byte by the model and by each compressor."""

    name: str
    n_bytes: int
    n_tokens: int
    model: float
    gzip: float
    xz: float

    @property
    def of_xz(self) -> float:
        """The model's bits over xz's: below 1 the model is better."""
        return self.model / self.xz


@torch.inference_mode()
def nats(model: Decoder, ids: list[int], start_id: int, window: int, stride: int) -> float:
    """Sum of -ln p over ``ids``, the first of them after ``start_id``."""
    stream = torch.tensor([start_id, *ids])
    total, scored = 0.0, 0
    begin = 0
    while scored < len(ids):
        end = min(begin + window, len(ids))
        attend = batched(1, end - begin)
        hidden_SM = row_hidden(model, stream[None, begin:end], attend)[scored - begin :]
        total += float(F.cross_entropy(head(model, hidden_SM), stream[scored + 1 : end + 1], reduction="sum"))
        scored, begin = end, begin + stride
    return total


def compressed_bits(data: bytes) -> tuple[int, int]:
    """Bits of ``gzip -9`` and of ``xz -9e``, headers included."""
    return 8 * len(gzip.compress(data, 9, mtime=0)), 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def score(model: Decoder, tokenizer: Tokenizer, name: str, texts: list[str], stride: int) -> Score:
    """``texts`` as one stream: joined by ends of text for the model (which pays for them), by nothing for the rest."""
    end = special_id(tokenizer, END_OF_TEXT)
    ids: list[int] = []
    for text in texts:
        ids += [*([end] if ids else []), *tokenizer.encode(text).ids]
    data = "".join(texts).encode()
    gzip_bits, xz_bits = compressed_bits(data)
    bits = nats(model, ids, end, model.spec.max_position, stride) / math.log(2)
    return Score(name, len(data), len(ids), bits / len(data), gzip_bits / len(data), xz_bits / len(data))


def overall(name: str, scores: list[Score]) -> Score:
    """Totals over texts compressed each for itself."""
    n = sum(s.n_bytes for s in scores)
    model, by_gzip, by_xz = (sum(getattr(s, key) * s.n_bytes for s in scores) / n for key in ("model", "gzip", "xz"))
    return Score(name, n, sum(s.n_tokens for s in scores), model, by_gzip, by_xz)


def score_files(
    model: Decoder, tokenizer: Tokenizer, documents: list[Document], stride: int, on_done: Callable[[], None]
) -> list[Score]:
    """Every document for itself."""
    scores = []
    for document in documents:
        scores.append(score(model, tokenizer, document.path, [document.framed], stride))
        on_done()
    return scores


def score_packages(
    model: Decoder, tokenizer: Tokenizer, documents: list[Document], stride: int, on_done: Callable[[], None]
) -> list[Score]:
    """Every held-out package, its tests included, as one stream: what compressors with a long memory like best."""
    scores = []
    for name in sorted({d.package for d in documents}):
        scores.append(score(model, tokenizer, name, [d.framed for d in documents if d.package == name], stride))
        on_done()
    return scores


@dataclass(frozen=True)
class Acceptance:
    """How far a draft is of use, over held-out text.

    ``agreement``: share of positions where both put the same token first. ``expected``: mean over positions
    of sum(min(p, q)), the rate of acceptance at temperature 1. ``accepted_greedy``: mean number of ``n_draft``
    drafted tokens that greedy decoding by the target would have chosen too.
    """

    positions: int
    agreement: float
    expected: float
    prompts: int
    n_draft: int
    accepted_greedy: float


@torch.inference_mode()
def acceptance(
    target: Decoder, draft: Decoder, stream: Tensor, n_windows: int, window: int, n_draft: int, seed: int
) -> Acceptance:
    """Both models over ``n_windows`` windows of ``stream``, drawn by ``seed``; each window is also continued."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - window, (n_windows,), generator=generator).tolist()
    same, shared = 0, 0.0
    attend = batched(1, window)
    for start in starts:
        row = stream[None, start : start + window]
        p_SV, q_SV = (F.softmax(head(m, row_hidden(m, row, attend)), dim=-1) for m in (target, draft))
        same += int((p_SV.argmax(-1) == q_SV.argmax(-1)).sum())
        shared += float(torch.minimum(p_SV, q_SV).sum())
    prompts_NS = torch.stack([stream[s : s + window] for s in starts])
    chosen_ND, drafted_ND = (greedy(m, prompts_NS, n_draft) for m in (target, draft))
    kept = (chosen_ND == drafted_ND).long().cumprod(dim=1).sum(dim=1).float().mean()
    n = n_windows * window
    return Acceptance(n, same / n, shared / n, n_windows, n_draft, float(kept))


def greedy(model: Decoder, prompts_NS: Tensor, n_new: int) -> Tensor:
    """The ``n_new`` most likely tokens after each prompt (N, n_new), without a cache."""
    tok_NS = prompts_NS
    for _ in range(n_new):
        batch, length = tok_NS.shape
        hidden_NM = row_hidden(model, tok_NS, batched(batch, length)).view(batch, length, -1)[:, -1]
        tok_NS = torch.cat((tok_NS, head(model, hidden_NM).argmax(-1, keepdim=True)), dim=1)
    return tok_NS[:, prompts_NS.shape[1] :]
