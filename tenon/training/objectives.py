"""What is minimised: the next token of text and of an assistant's turns, or a teacher's distribution there.

Losses are in nats per counted token. Batches go through the model in parts that fit the processor's
cache; the gradient is that of the whole batch.

Shapes: B rows of S tokens, T = B x S, C counted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tenon.models.decoder import Attend, Decoder
from tenon.training.attention import batched
from tenon.training.chats import Chats
from tenon.training.rows import Cursor, Rows


def row_hidden(model: Decoder, tok_BS: Tensor, attend: Attend) -> Tensor:
    """Last hidden states (T, M) of rows that begin at position 0 each; matrix products in bf16."""
    batch, length = tok_BS.shape
    pos_T = torch.arange(length).repeat(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.hidden(tok_BS.reshape(-1), pos_T, attend)


def head(model: Decoder, hidden_TM: Tensor) -> Tensor:
    """Logits (T, V), multiplied in bf16, returned in fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.logits(hidden_TM).float()


@dataclass(frozen=True)
class Lengths:
    """Row length by iteration: ``starts`` pairs of (first iteration, tokens), ascending from 0."""

    starts: tuple[tuple[int, int], ...]

    def at(self, iteration: int) -> int:
        return [length for start, length in self.starts if start <= iteration][-1]


@dataclass(frozen=True)
class Mixture:
    """``text`` rows, and ``chats`` for ``chat_share`` of the tokens."""

    text: Rows
    lengths: Lengths
    batch_tokens: int
    chats: Chats | None = None
    chat_share: float = 0.0

    def take(self, cursor: Cursor, iteration: int) -> tuple[Tensor, Tensor, Cursor]:
        """Tokens (B, S + 1), which targets count (B, S), and the next cursor."""
        length = self.lengths.at(iteration)
        n_rows = max(1, self.batch_tokens // length)
        n_chats = round(n_rows * self.chat_share) if self.chats is not None else 0
        rows, cursor = self.text.take(cursor, n_rows - n_chats, length)
        counted = np.ones((len(rows), length), np.bool_)
        if self.chats is not None and n_chats:
            chat_rows, chat_counted = self.chats.take(iteration, n_chats, length)
            rows, counted = np.concatenate([rows, chat_rows]), np.concatenate([counted, chat_counted])
        return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(counted), cursor


class NextToken:
    """Cross-entropy with what comes next; with a ``teacher`` its distribution takes ``teacher_share`` of the loss."""

    def __init__(
        self, mixture: Mixture, part_tokens: int = 2048, teacher: Decoder | None = None, teacher_share: float = 0.0
    ) -> None:
        self.mixture, self.part_tokens = mixture, part_tokens
        self.teacher, self.teacher_share = teacher, teacher_share

    def __call__(self, model: Decoder, cursor: Cursor, iteration: int) -> tuple[float, Cursor]:
        tokens, counted, cursor = self.mixture.take(cursor, iteration)
        per_part = max(1, self.part_tokens // counted.shape[1])
        n_counted = int(counted.sum())
        total = 0.0
        for part, keep in zip(tokens.split(per_part), counted.split(per_part), strict=True):
            loss = self._sum(model, part, keep) / n_counted
            loss.backward()
            total += loss.item()
        return total, cursor

    def _sum(self, model: Decoder, part: Tensor, keep: Tensor) -> Tensor:
        attend = batched(*keep.shape)
        tok_BS, keep_T = part[:, :-1], keep.reshape(-1)
        target_C = part[:, 1:].reshape(-1)[keep_T]
        logits_CV = head(model, row_hidden(model, tok_BS, attend)[keep_T])
        loss = F.cross_entropy(logits_CV, target_C, reduction="sum")
        if self.teacher is None:
            return loss
        with torch.no_grad():
            goal_CV = F.softmax(head(self.teacher, row_hidden(self.teacher, tok_BS, attend)[keep_T]), dim=-1)
        taught = F.cross_entropy(logits_CV, goal_CV, reduction="sum")
        return (1 - self.teacher_share) * loss + self.teacher_share * taught
