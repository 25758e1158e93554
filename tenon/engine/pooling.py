"""Embeddings: a prompt's last hidden states as one vector, for requests that want nothing else.

Of "last" the last token's row is an output, and what is resident of the prompt need not be computed. Of "mean" every
row is one, so what the cache has is left alone; sums go on from step to step, and where the sequence is preempted no
row counts twice. A step's hidden states come after its samples and scores. Sums are in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenon.engine.assemble import Span
from tenon.engine.messages import Embed, Embedded
from tenon.engine.outputs import with_outputs
from tenon.engine.sequence import State
from tenon.engine.step import F64, HIDDEN, Step, StepResult


def positions(span: Span) -> range:
    """The rows of ``span``, by position, whose hidden states are wanted."""
    seq = span.seq
    embed = seq.request.add.embed
    end = span.start + span.n
    if embed is None:
        return range(end, end)
    return range(max(span.start, seq.n_prompt - 1 if embed.pooling == "last" else seq.n_pooled), end)


def with_hidden(step: Step, spans: Sequence[Span]) -> Step:
    """The step of ``spans`` with an output more for each row whose hidden state is wanted."""
    seqs, rows, places = [], [], []
    for i, span in enumerate(spans):
        if span.targets or span.seq.request.add.embed is None or not (wanted := positions(span)):
            continue
        seqs.append(span.seq.id)
        rows.append(int(step.q_start[i]) + np.arange(wanted.start - span.start, wanted.stop - span.start))
        places.append(np.arange(wanted.start, wanted.stop) - span.seq.n_prompt)
    return with_outputs(step, HIDDEN, seqs, [-1] * len(seqs), rows, places) if seqs else step


def pooled(step: Step, spans: Sequence[Span], result: StepResult) -> list[Embedded]:
    """Whose prompts the step has ended. Called once the step's rows count as computed, where they do."""
    found: list[Embedded] = []
    if not len(step.want) or step.want[-1] != HIDDEN:
        return found
    at = 0
    for span in spans:
        seq = span.seq
        embed = seq.request.add.embed
        if embed is None or not (wanted := positions(span)):
            continue
        rows = result.hidden[at : at + len(wanted)]
        at += len(wanted)
        if seq.state is not State.RUNNING or seq.n_computed < wanted.stop:
            continue
        total = rows.sum(0, dtype=np.float64)
        seq.pooled = total if seq.pooled is None else seq.pooled + total
        seq.n_pooled = wanted.stop
        if seq.n_pooled == seq.n_prompt:
            n = 1 if embed.pooling == "last" else seq.n_prompt
            found.append(Embedded(seq.request.add.request_id, _finished(seq.pooled / n, embed)))
    return found


def _finished(vector_M: F64, embed: Embed) -> bytes:
    """As many dimensions as are wanted, of length one if that is."""
    vector_M = vector_M[: embed.dimensions or None]
    length = float(np.linalg.norm(vector_M))
    if embed.normalize and length > 0:
        vector_M = vector_M / length
    return vector_M.astype("<f4").tobytes()
