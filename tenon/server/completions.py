"""From a validated request to an answer: ids, admission, then the stream or the whole.

Nothing is sent before the engine has accepted every prompt, so what is wrong with a request is always told by the
HTTP status; what goes wrong later in a stream is one error event without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec

from tenon.base.errors import ContextTooLong, IntegrityError, RequestError, TenonError
from tenon.engine.messages import Add, Grammar
from tenon.engine.params import SamplingParams
from tenon.engine.structure import Structure
from tenon.models.tokenizer import CALL_MARKS, is_thinking
from tenon.server.estimate import estimate_json
from tenon.server.failures import Refusal, body_of
from tenon.server.flights import Job, Origin
from tenon.server.keys import Caller
from tenon.server.model_text import ModelText
from tenon.server.outcome import slo_json
from tenon.server.protocol import ChatRequest, CompletionRequest, StreamOptions, check_work, sampling_params
from tenon.server.responses import (
    DONE,
    ChatFace,
    Collected,
    CompletionFace,
    Face,
    Head,
    Json,
    Usage,
    sse,
    stream_chunk,
)
from tenon.server.service import Service
from tenon.server.slo import NO_OBJECTIVES, Objectives, Promise, Urgent
from tenon.server.text import Echo, IncrementalDecoder, OutputText, Piece
from tenon.server.tokens import ids_of
from tenon.server.tool_text import ToolText
from tenon.server.tools import Calling, calling

_log = logging.getLogger("tenon.server")

COMPLETION_MAX_TOKENS: Final = 16
"""OpenAI's default for ``/v1/completions``; a chat answer may fill the context."""


@dataclass(frozen=True)
class Answer:
    """An accepted request: its job, and how its outputs are told."""

    job: Job
    face: Face
    outputs: list[OutputText]
    n_prompt: int
    options: StreamOptions
    echoes: Sequence[Echo] = ()
    """Of prompts that are scored."""
    decoder: Callable[[], IncrementalDecoder] | None = None
    """One at the start of a text, for echoes."""
    best: int = 0
    """Of each prompt's outputs, how many are told, the likeliest; 0: all."""
    echoes_only: bool = False
    prompt_logprobs: bool = False
    """Whether those of ``echoes`` are told by themselves."""

    def usage(self) -> Usage:
        n_output = 0 if self.echoes_only else sum(output.n_tokens for output in self.outputs)
        n_thought = sum(output.n_thought for output in self.outputs)
        return Usage(self.n_prompt, n_output, self.job.cached_tokens, n_thought, slo_json(self.job.flights[0]))

    @property
    def _n(self) -> int:
        """Outputs of each prompt."""
        return len(self.outputs) // len(self.job.flights)

    def _score(self, prompt: int) -> None:
        """The prompt's scores are all there by the time of its first output."""
        if self.echoes and self.decoder is not None:
            self.echoes[prompt].score(self.job.scores(prompt), self.decoder())

    async def whole(self) -> Json:
        """The answer in one piece. Raises what the request failed with."""
        collected = [Collected() for _ in self.outputs]
        async for choice, piece in self.pieces():
            collected[choice].add(piece)
        for prompt in range(len(self.echoes)):
            self._score(prompt)
        choices = [self.face.choice(i, each) for i, each in enumerate(self._chosen(collected))]
        answer = self.face.wrap(choices, chunk=False) | {"usage": self.usage().at_end()}
        if self.prompt_logprobs:
            self.face.add_prompts(answer, self.echoes)
        return answer

    def _chosen(self, collected: list[Collected]) -> list[Collected]:
        if not self.best:
            return collected
        groups = [collected[at : at + self._n] for at in range(0, len(collected), self._n)]
        ranked = [sorted(group, key=Collected.mean_logprob, reverse=True) for group in groups]
        return [one for group in ranked for one in group[: self.best]]

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; one terminal: ``[DONE]`` or an error event."""
        usage = self._chunk_usage if self.options.include_usage or self.options.continuous_usage_stats else None
        closed = set(range(len(self.outputs))) if self.echoes else set()
        """Choices whose opening waits until their prompt has been scored."""
        openings = [self.face.opening(choice) for choice in range(len(self.outputs)) if choice not in closed]
        yield b"".join(stream_chunk(self.face, opening, usage) for opening in openings if opening is not None)
        try:
            async for choice, piece in self.pieces():
                if choice in closed:
                    closed.remove(choice)
                    self._score(choice // self._n)
                    if opening := self.face.opening(choice):
                        yield stream_chunk(self.face, opening, usage)
                if piece.text or piece.logprobs or piece.reasoning or piece.calls:
                    yield stream_chunk(self.face, self.face.content(choice, piece), usage)
                if piece.finish_reason is not None:
                    yield stream_chunk(self.face, self.face.finish(choice, piece.finish_reason), usage)
        except TenonError as error:
            yield sse(body_of(error))
            return
        if self.options.include_usage:
            yield sse(self.face.wrap([], chunk=True) | {"usage": self.usage().at_end()})
        yield DONE

    def _chunk_usage(self) -> Json | None:
        return self.usage().to_json() if self.options.continuous_usage_stats else None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What comes, by choice. Raises what the request failed with."""
        while batch := await self.job.batch():
            for choice, delta in batch:
                output = self.outputs[choice]
                if output.finished:
                    continue
                piece = output.push(delta)
                if output.finished:
                    self.job.close_choice(choice, output.n_tokens)
                if self.echoes_only:
                    piece = Piece("", (), "length" if output.finished else None)
                yield choice, piece


@dataclass(frozen=True)
class Said:
    """A conversation as a template sees it, and what else the template is to know."""

    messages: Sequence[dict[str, Any]]
    calling: Calling | None = None
    variables: dict[str, Any] | None = None


@dataclass(frozen=True)
class Asked:
    """A request before the engine hears of it."""

    adds: list[Add]
    params: SamplingParams
    text: ModelText


class Completions:
    """Whatever generates, over one model. ``objectives``: what the server's classes promise."""

    def __init__(self, service: Service, objectives: Objectives = NO_OBJECTIVES) -> None:
        self._service = service
        self.objectives = objectives
        self.model_text: ModelText | None = None

    async def estimate(self, request: ChatRequest | CompletionRequest, origin: Origin) -> Json:
        """What might be expected of it. Raises ``RequestError``."""
        if isinstance(request, ChatRequest):
            text = self.require_model(request.model)
            promise = self.promised(request, origin)
            asked = await self._conversing(_said(request, text), self._params(request, text), text, origin, promise)
        else:
            asked = await self._completing(request, origin)
        return estimate_json(asked.adds[0], await self._service.estimate(asked.adds[0]))

    def promised(self, request: Urgent, origin: Origin) -> Promise:
        """Raises ``RequestError`` for what cannot be promised, ``Refusal`` when not ready."""
        token_s = self._service.require_ready().token_s
        return self.objectives.of(request, origin.heard, origin.caller.key, token_s)

    async def complete(self, request: CompletionRequest, origin: Origin) -> Answer:
        """``/v1/completions`` up to the engine's acceptance. Raises ``RequestError``."""
        try:
            return await self._complete(request, origin)
        except ContextTooLong as error:
            error.param = "prompt"  # it names chat's field otherwise
            raise

    async def _completing(self, request: CompletionRequest, origin: Origin) -> Asked:
        text, promise = self.require_model(request.model), self.promised(request, origin)
        params, most = self._params(request, text), self._service.require_ready().max_model_len
        prompts = [await ids_of(text, p, special=True, most=most) if isinstance(p, str) else p for p in request.prompts]
        max_tokens = params.max_tokens or text.generation.max_new_tokens or COMPLETION_MAX_TOKENS
        bad_words = text.spellings(params.bad_words)
        adds = [
            self._add(prompt, params, max_tokens, text, bad_words, i, origin, promise)
            for i, prompt in enumerate(prompts)
        ]
        if request.seed is None:
            adds = [add if i == 0 else msgspec.structs.replace(add, seed=draw_seed()) for i, add in enumerate(adds)]
        return Asked(adds, params, text)

    async def _complete(self, request: CompletionRequest, origin: Origin) -> Answer:
        asked = await self._completing(request, origin)
        params, text = asked.params, asked.text
        prompts = [list(add.prompt) for add in asked.adds]
        shown = [p if isinstance(p, str) else text.decode(p) for p in request.prompts] if request.echo else []
        echo = [Echo(said, ids) for said, ids in zip(shown, prompts, strict=bool(shown))]
        face = CompletionFace(
            self.head("cmpl", origin), text, logprobs=request.logprobs is not None,
            n=(request.n or 1) if request.best_of else params.n, echo=echo,
        )  # fmt: skip
        answer = await self._submit(asked, face, request.stream_options, origin)
        is_scored = params.prompt_logprobs is not None
        return replace(
            answer,
            echoes=echo or [Echo("", ids) for ids in prompts] if is_scored else (),
            prompt_logprobs=request.prompt_logprobs is not None,
            decoder=partial(text.detokenizer, ()),
            best=(request.n or 1) if request.best_of else 0,
            echoes_only=request.echoes_only,
        )

    async def chat(self, request: ChatRequest, origin: Origin) -> Answer:
        """``/v1/chat/completions`` up to the engine's acceptance. Raises ``RequestError``."""
        text = self.require_model(request.model)
        params = self._params(request, text)
        id_length = text.dialect.id_length if text.dialect is not None else None
        face = ChatFace(self.head("chatcmpl", origin), text, logprobs=bool(request.logprobs), id_length=id_length)
        promise = self.promised(request, origin)
        return await self.converse(_said(request, text), params, text, face, request.stream_options, origin, promise)

    async def converse(
        self,
        said: Said,
        params: SamplingParams,
        text: ModelText,
        face: Face,
        options: StreamOptions | None,
        origin: Origin,
        promise: Promise,
    ) -> Answer:
        """What follows a conversation, up to the engine's acceptance. Raises ``RequestError``."""
        asked = await self._conversing(said, params, text, origin, promise)
        answer = await self._submit(asked, face, options, origin, said)
        if params.prompt_logprobs is None:
            return answer
        echoes = [Echo("", asked.adds[0].prompt)]
        return replace(answer, echoes=echoes, prompt_logprobs=True, decoder=partial(text.detokenizer, ()))

    async def _conversing(
        self, said: Said, params: SamplingParams, text: ModelText, origin: Origin, promise: Promise
    ) -> Asked:
        dialect, tools = text.dialect, None
        if "enable_thinking" in (said.variables or {}) and not _reads_thinking(text):
            _log.warning(
                "this model's chat template does not ask for thinking; what a request says of it has no effect"
            )
        if said.calling is not None and dialect is not None:
            tools, form = said.calling.to_template(), said.calling.structure(dialect)
            if form is not None and params.structure is not None:
                raise RequestError(
                    "the form of an answer and calls that are forced or strict cannot be had together",
                    param=params.structure.param,
                    code="invalid_value",
                )
            params = params if form is None else params.with_(structure=form)
        rendered = await text.render(said.messages, tools=tools, variables=said.variables)
        most = self._service.require_ready().max_model_len
        prompt = await ids_of(text, rendered, special=False, most=most)
        room = most - len(prompt)
        max_tokens = params.max_tokens or max(1, min(text.generation.max_new_tokens or room, room))
        bad_words = text.spellings(params.bad_words)
        return Asked([self._add(prompt, params, max_tokens, text, bad_words, 0, origin, promise)], params, text)

    def tokenizer(self, model: str | None) -> ModelText:
        """For those who only count. Raises ``Refusal``: another model, or not loaded yet."""
        self._service.require_model(self._service.model if model is None else model)
        if self.model_text is None:
            raise Refusal("the tokenizer is not loaded yet", status=503, code="model_loading", retry_after_s=1.0)
        return self.model_text

    def require_model(self, name: str) -> ModelText:
        """The text side of the model that is served. Raises ``Refusal``: another one, or not ready."""
        self._service.require_model(name)
        self._service.require_ready()
        if self.model_text is None:
            raise IntegrityError("the server is ready and has no tokenizer")
        return self.model_text

    def _params(self, request: CompletionRequest | ChatRequest, text: ModelText) -> SamplingParams:
        if request.stream_options is not None and not request.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
        return sampling_params(request, defaults=text.generation.sampling(), seed=draw_seed())

    def _add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        text: ModelText,
        bad_words: tuple[tuple[int, ...], ...],
        number: int,
        origin: Origin,
        promise: Promise,
    ) -> Add:
        """The engine's message for one prompt. Raises ``RequestError`` for ids or lengths that no model state fits."""
        ready = self._service.require_ready()
        if not prompt:
            raise RequestError(
                "the prompt has no tokens; it must have at least one", param="prompt", code="invalid_value"
            )
        bad = next((token for token in prompt if not 0 <= token < ready.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} is outside the vocabulary of {ready.vocab_size}", param="prompt", code="invalid_value"
            )
        if len(prompt) + max_tokens > ready.max_model_len:
            raise ContextTooLong(len(prompt), max_tokens, ready.max_model_len)
        add = params.add(
            f"{origin.request_id}/{number}", prompt, max_tokens=max_tokens, seed=params.seed or 0,
            stop_ids=_stop_ids(params, text), bad_words=bad_words, arrival_s=origin.arrival_s,
            tenant=origin.caller.tenant,
        )  # fmt: skip
        return msgspec.structs.replace(add, slo=promise.slo, slo_class=promise.name)

    async def _submit(
        self, asked: Asked, face: Face, options: StreamOptions | None, origin: Origin, said: Said | None = None
    ) -> Answer:
        adds, params, text = asked.adds, asked.params, asked.text
        n_scored = sum(len(add.prompt) for add in adds if add.prompt_logprobs >= 0)
        check_work(len(adds), params, max(add.max_tokens for add in adds), n_scored, self._service.limits)
        if params.structure is not None:
            adds = await self._with_grammar(adds, params.structure, text, origin.caller)
        job = self._service.submit(adds, origin.caller, origin.trace)
        try:
            await job.accepted()
        except asyncio.CancelledError:
            job.abort()
            raise
        outputs = [_output(text, add, params, said) for add in adds for _ in range(add.n)]
        return Answer(job, face, outputs, sum(len(add.prompt) for add in adds), options or StreamOptions())

    async def _with_grammar(
        self, adds: Sequence[Add], structure: Structure, text: ModelText, caller: Caller
    ) -> list[Add]:
        """The same requests with their structure compiled. Raises ``RequestError`` for one that cannot be."""
        self._service.expect_grammar()
        name, compiled = await text.grammars.compile_soon(structure, caller.tenant)
        think = text.tokenizer.think
        return [
            msgspec.structs.replace(add, grammar=Grammar(name, compiled, think, is_thinking(add.prompt, think)))
            for add in adds
        ]

    def head(self, kind: str, origin: Origin) -> Head:
        """What the objects of an answer repeat."""
        return Head(f"{kind}-{origin.request_id}", int(self._service.clock.wall_s()), self._service.model)


def _said(request: ChatRequest, text: ModelText) -> Said:
    return Said(
        [message.flat(i) for i, message in enumerate(request.messages)],
        calling(request.tools, request.tool_choice, request.parallel_tool_calls, text.dialect),
        _variables(request, text),
    )


def _variables(request: ChatRequest, text: ModelText) -> dict[str, Any]:
    """What else the template is to know. Raises ``RequestError`` for what it does not read."""
    given, template = request.variables(), "".join(text.renderer.templates.sources.values())
    for name in request.chat_template_kwargs or ():
        if name not in template:
            where = f"chat_template_kwargs.{name}"
            raise RequestError(f"the model's chat template does not read {name}", param=where, code="unsupported")
    if request.reasoning_effort not in (None, "none") and not _reads_thinking(text):
        said = "this model has no reasoning_effort: its chat template does not ask for any"
        raise RequestError(said, param="reasoning_effort", code="unsupported")
    return given


def _reads_thinking(text: ModelText) -> bool:
    template = "".join(text.renderer.templates.sources.values())
    return "enable_thinking" in template or "reasoning_effort" in template


def _output(text: ModelText, add: Add, params: SamplingParams, said: Said | None) -> OutputText:
    """Of one sequence. What only answers the conversation ``said`` is told as thoughts, calls and the rest."""
    if said is None:
        return OutputText(text.detokenizer(add.prompt), params.stop, params.min_tokens)
    thought, dialect = text.thought(add.prompt), text.dialect
    if said.calling is None or dialect is None:
        return OutputText(text.detokenizer(add.prompt), params.stop, params.min_tokens, thought)
    decoder = text.detokenizer(add.prompt, keep=CALL_MARKS)
    parser = ToolText(dialect, [function.name for function in said.calling.functions])
    return OutputText(decoder, params.stop, params.min_tokens, thought, parser)


def _stop_ids(params: SamplingParams, text: ModelText) -> tuple[int, ...]:
    """What the request names, and the ends that the model's makers name beyond those the engine knows."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids + text.generation.eos_ids


def draw_seed() -> int:
    """For who names none."""
    return secrets.randbits(63)
