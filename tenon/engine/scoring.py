"""Log-probabilities of a prompt's own tokens, for requests that want them.

The row at position p scores the token at p + 1, so all of the prompt but its first token is scored, and all rows but
the last do nothing else. They have to be computed: what such a request would find in the cache is left alone until its
prompt has been scored once. A step's scores come after its samples, and are sent on before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tenon.engine.assemble import Span
from tenon.engine.messages import PromptScores
from tenon.engine.outputs import with_outputs
from tenon.engine.sequence import State
from tenon.engine.step import SCORE, Step, StepResult


def positions(span: Span) -> range:
    """The rows of ``span``, by position, whose next token is still to be scored."""
    seq = span.seq
    return range(max(span.start, seq.n_scored - 1), min(span.start + span.n, seq.n_prompt - 1))


def with_scores(step: Step, spans: Sequence[Span]) -> Step:
    """The step of ``spans`` with an output more for each row that scores."""
    first, count, tokens, row, places = [], [], [], [], []
    for i, span in enumerate(spans):
        if not span.seq.to_score or not (scored := positions(span)):
            continue
        first.append(i)
        count.append(len(scored))
        row.append(int(step.q_start[i]) + np.arange(scored.start - span.start, scored.stop - span.start))
        tokens.append(span.seq.tokens[scored.start + 1 : scored.stop + 1])
        places.append(np.arange(scored.start + 1, scored.stop + 1) - span.seq.n_prompt)
    if not first:
        return step
    seqs = [spans[i].seq for i in first]
    n_logprobs = [seq.request.add.prompt_logprobs for seq in seqs]
    longer = with_outputs(step, SCORE, [seq.id for seq in seqs], n_logprobs, row, places)
    n = sum(count)
    return replace(
        longer,
        score_start=np.concatenate((step.score_start, 1 + np.arange(n, dtype=np.int32))),
        score_token=np.concatenate(tokens).astype(np.int32),
    )


def told(spans: Sequence[Span], result: StepResult) -> list[PromptScores]:
    """What the step scored, of the sequences that are still there; they remember that it was."""
    found: list[PromptScores] = []
    at, r = 0, sum(span.n_outputs for span in spans)
    for span in spans:
        seq = span.seq
        scored = positions(span)
        if not seq.to_score or not scored:
            continue
        n, k = len(scored), max(0, seq.request.add.prompt_logprobs)
        here, rows = slice(at, at + n), slice(r, r + n)
        at, r = at + n, r + n
        if seq.state is not State.RUNNING or seq.id in result.errors:
            continue
        seq.n_scored = scored.stop + 1
        seq.to_score = seq.n_scored < seq.n_prompt
        best = zip(result.top_ids[rows, :k].tolist(), result.top_logprobs[rows, :k].tolist(), strict=True)
        top = tuple(tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in best)
        name = seq.request.add.request_id
        logprobs, ranks = tuple(result.scores[here].tolist()), tuple(result.ranks[here].tolist())
        found.append(PromptScores(name, scored.start + 1, logprobs, top, ranks))
    return found


def output_scores(
    result: StepResult, outputs: Sequence[int], k: int
) -> tuple[tuple[float, ...], tuple[tuple[tuple[int, float], ...], ...]]:
    """The log-probabilities of the tokens of ``outputs`` and of each the ``k`` best alternatives; nothing where ``k``
    is -1."""
    if k < 0:
        return (), ()
    found = [zip(result.top_ids[r, :k].tolist(), result.top_logprobs[r, :k].tolist(), strict=True) for r in outputs]
    return tuple(result.logprobs[list(outputs)].tolist()), tuple(tuple(best) for best in found)
