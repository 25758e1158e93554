"""``LLM``: a model in this process, for scripts and notebooks. The engine is the server's own.

from tenon import LLM, SamplingParams
llm = LLM("embedded")
for answer in llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=32)):
    print(answer.outputs[0].text)
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tenon.base.clock import SYSTEM
from tenon.base.errors import ContextTooLong, RequestError
from tenon.engine.build import build_engine
from tenon.engine.config import EngineConfig
from tenon.engine.embed import wanted
from tenon.engine.grammar import Compiler, Vocabulary
from tenon.engine.messages import Add, Grammar
from tenon.engine.params import SamplingParams
from tenon.engine.structure import Structure
from tenon.models.embedding import read_embedding
from tenon.models.generation import read_generation
from tenon.models.hf_config import read_config
from tenon.models.hub import resolve
from tenon.models.template import Renderer, load_templates
from tenon.models.tokenizer import Detokenizer, is_thinking, load_tokenizer
from tenon.server.text import OutputText

Prompt = str | Sequence[int]


@dataclass
class Output:
    """One sequence of an answer. ``finish_reason``: "stop" or "length"; ``logprobs`` only where asked for."""

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Answer:
    """What came of one prompt: ``n`` outputs, and how many prompt tokens were in the cache already.

    ``prompt_logprobs``, where asked for: of the prompt's tokens from the second on, for nothing precedes the first.
    """

    prompt_ids: list[int]
    outputs: list[Output]
    seed: int
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class _Stream:
    """An output and its text as ids come in."""

    output: Output
    text: OutputText


class LLM:
    """Loads ``model`` (a folder, a hub name, or "embedded") and answers lists of prompts.

    Keywords are those of ``EngineConfig``. Raises ``ConfigError`` or ``CheckpointError`` where the model cannot be
    served. Close it, or use it as a context manager, to release its memory.
    """

    def __init__(self, model: str = "embedded", *, progress: bool = True, **config: Any) -> None:
        self.config = EngineConfig(model=model, **config)
        folder = resolve(model)
        self.spec = read_config(folder)
        self.tokenizer = load_tokenizer(folder, self.spec.vocab_size)
        self.defaults = read_generation(folder, self.spec)
        self.embedding = read_embedding(folder, self.spec)
        self._renderer = Renderer(load_templates(folder), n_workers=1)
        self._grammars = Compiler(Vocabulary(str(folder), self.spec.vocab_size, self.defaults.eos_ids))
        self._progress = progress
        with self._bar("loading") as bar:
            task = bar.add_task(model, total=None)
            self.engine = build_engine(
                self.config, lambda name, _, detail: bar.update(task, description=f"{name}: {detail}")
            )
        self.engine.stop_kv_events()
        self._n_requests = 0

    def _bar(self, what: str) -> Progress:
        columns = (TextColumn(f"{what} {{task.description}}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        return Progress(*columns, transient=True, disable=not self._progress)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Answer]:
        """Continue each prompt (text, or token ids); answers come in the order of the prompts.

        ``params`` None takes the model's own ``generation_config.json``. Raises ``RequestError`` naming the first
        prompt that cannot be served; then none of them is.
        """
        ids = self._ids(prompts)
        params = params or self._defaults()
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(ids):
            raise RequestError(f"{len(ids)} prompts need as many params, got {len(each)}", param="params")
        return self._run(ids, each)

    def embed(self, texts: Prompt | Sequence[Prompt], *, dimensions: int | None = None) -> NDArray[np.float32]:
        """Vectors (n, width) of texts, or of token ids, from the last hidden states, pooled as the checkpoint's makers
        do; ``dimensions`` keeps the first ones. Raises ``RequestError`` naming what cannot be served."""
        asked = wanted(self.embedding, dimensions)
        found: dict[str, NDArray[np.float32] | None] = {}
        try:
            for ids in self._ids(texts):
                self._n_requests += 1
                name = f"llm-{self._n_requests}"
                self.engine.add(Add(name, tuple(ids), 0, 0, arrival_s=SYSTEM.now_s(), embed=asked))
                found[name] = None
            while self.engine.has_work:
                if lost := next((delta for delta in self.engine.tick(SYSTEM.now_s()) if delta.error is not None), None):
                    raise RequestError(f"text {list(found).index(lost.request_id)} failed: {lost.error}")
                for one in self.engine.take_embedded():
                    found[one.request_id] = np.frombuffer(one.vector, "<f4")
        except BaseException:
            for name in found:
                self.engine.abort(name)
            self.engine.take_embedded()
            raise
        rows = [row for row in found.values() if row is not None]
        return np.stack(rows) if rows else np.zeros((0, dimensions or self.embedding.width), np.float32)

    def _ids(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        many: list[Prompt] = (
            [prompts]  # type: ignore[list-item]
            if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
            else list(prompts)  # type: ignore[arg-type]
        )
        return [self.tokenizer.encode(p, add_special=True) if isinstance(p, str) else list(p) for p in many]

    def chat(self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None) -> Answer:
        """Answer a conversation of ``{"role": ..., "content": ...}`` through the model's chat template."""
        text = self._renderer.render(messages)
        params = params or self._defaults()
        return self._run([self.tokenizer.encode(text, add_special=False)], [params])[0]

    def compile(self, structure: Structure) -> None:
        """Compile what a request's output must be, so that the first of its requests need not wait for it. Raises
        ``RequestError`` for one that cannot be."""
        self._grammars.compile(structure)

    def _defaults(self) -> SamplingParams:
        given: dict[str, Any] = dict(self.defaults.sampling())
        return SamplingParams(**given)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
        answers: list[Answer] = []
        streams: dict[tuple[str, int], _Stream] = {}
        names: dict[str, Answer] = {}
        try:
            for ids, p in zip(prompts, params, strict=True):
                add = self._add(ids, p)
                answer = Answer(ids, [Output(i) for i in range(p.n)], add.seed)
                answers.append(answer)
                names[add.request_id] = answer
                for output in answer.outputs:
                    text = OutputText(Detokenizer(self.tokenizer, at_start=False), p.stop, p.min_tokens)
                    streams[add.request_id, output.index] = _Stream(output, text)
                self.engine.add(add)
        except RequestError:
            for name in names:
                self.engine.abort(name)
            raise
        try:
            self._decode(names, streams)
        except BaseException:
            self.engine.reset()
            raise
        return answers

    def _add(self, ids: list[int], p: SamplingParams) -> Add:
        limit = self.engine.identity.max_model_len
        room = limit - len(ids)
        if room < 1:
            raise ContextTooLong(len(ids), p.max_tokens or 1, limit)
        self._n_requests += 1
        grammar = None
        if p.structure is not None:
            think = self.tokenizer.think
            name, compiled = self._grammars.compile(p.structure)
            grammar = Grammar(name, compiled, think, is_thinking(ids, think))
        return p.add(
            f"llm-{self._n_requests}", ids, max_tokens=p.max_tokens or room,
            seed=p.seed if p.seed is not None else secrets.randbits(64), stop_ids=p.stop_token_ids,
            bad_words=self.tokenizer.spellings(p.bad_words), arrival_s=SYSTEM.now_s(), grammar=grammar,
        )  # fmt: skip

    def _decode(self, names: dict[str, Answer], streams: dict[tuple[str, int], _Stream]) -> None:
        with self._bar("generating") as bar:
            task = bar.add_task(f"{len(names)} prompts", total=len(streams))
            begin_s, n_tokens = SYSTEM.now_s(), 0
            while self.engine.has_work:
                deltas = self.engine.tick(SYSTEM.now_s())
                for scores in self.engine.take_prompt_scores():
                    names[scores.request_id].prompt_logprobs.extend(scores.logprobs)
                    names[scores.request_id].prompt_top_logprobs.extend(dict(t) for t in scores.top)
                for delta in deltas:
                    stream = streams[delta.request_id, delta.index]
                    output = stream.output
                    if output.finish_reason is not None:
                        continue
                    if delta.error is not None:
                        raise RequestError(f"prompt {list(names).index(delta.request_id)} failed: {delta.error}")
                    names[delta.request_id].cached_tokens = delta.cached_tokens
                    piece = stream.text.push(delta)
                    n_new = stream.text.n_tokens - len(output.ids)  # what follows a stop string is not the output's
                    n_tokens += n_new
                    output.ids.extend(delta.ids[:n_new])
                    output.logprobs.extend(delta.logprobs[:n_new])
                    output.top_logprobs.extend(dict(t) for t in delta.top[:n_new])
                    output.text += piece.text
                    output.finish_reason = piece.finish_reason
                    if output.finish_reason is not None:
                        bar.advance(task)
                    if output.finish_reason is not None and delta.finish_reason is None:  # by a stop string
                        self.engine.abort(delta.request_id, delta.index, reason="stop")
                rate = n_tokens / max(SYSTEM.now_s() - begin_s, 1e-9)
                bar.update(task, description=f"{len(names)} prompts, {rate:.0f} tokens/s")

    def close(self) -> None:
        """Release the weights, the cache and the workers."""
        self._renderer.close()
        self._grammars.close()
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
