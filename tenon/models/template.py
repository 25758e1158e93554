"""Chat templates: where a checkpoint keeps them, and rendering them in a process that can be killed.

    Templates   what the files say: named jinja sources and the special tokens they see
    Renderer    a few workers (``template_worker``); a render that overruns its limits costs its worker and one request

A template is code of whoever made the checkpoint. It never runs in this process.
"""

from __future__ import annotations

import queue
from asyncio import to_thread
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tenon.base import clock as clocks
from tenon.base.errors import CheckpointError, RequestError
from tenon.base.worker import LineWorker
from tenon.models import template_worker
from tenon.models.metadata import read_bytes, read_object

CONFIG_NAME: Final = "tokenizer_config.json"
JINJA_NAME: Final = "chat_template.jinja"
LEGACY_NAME: Final = "chat_template.json"
HELLO: Final = {"template": "", "data": None, "now_s": 0.0, "cpu_s": 1.0, "max_chars": 0}
MORE_FOLDER: Final = "additional_chat_templates"
DEFAULT: Final = "default"
TOOL_USE: Final = "tool_use"
TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Templates:
    """A model's templates by name, and the special tokens that each of them sees as variables."""

    sources: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)

    def choose(self, name: str | None = None, *, tools: bool = False) -> str:
        """The source to render: the named one, ``tool_use`` with tools where there is one, else ``default``.

        Raises ``RequestError`` when the model has none, or none of that name.
        """
        if not self.sources:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or add a chat_template.jinja to its folder",
                param="messages",
                code="no_chat_template",
            )
        wanted = name or (TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT)
        if wanted not in self.sources:
            raise RequestError(
                f"this model has no chat template {wanted!r}; it has {', '.join(sorted(self.sources))}",
                param="chat_template",
                code="no_chat_template",
            )
        return self.sources[wanted]


def load_templates(folder: Path) -> Templates:
    """The templates of the checkpoint in ``folder``; a model without any gives empty ``sources``.

    ``chat_template.jinja`` wins over ``tokenizer_config.json``. Raises ``CheckpointError`` for damaged files.
    """
    config = read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    sources = _named(config.get("chat_template"), folder / CONFIG_NAME)
    if (folder / LEGACY_NAME).exists():
        sources |= _named(read_object(folder / LEGACY_NAME).get("chat_template"), folder / LEGACY_NAME)
    if (folder / JINJA_NAME).exists():
        sources[DEFAULT] = _text(folder / JINJA_NAME)
    for path in sorted((folder / MORE_FOLDER).glob("*.jinja")):
        sources[path.stem] = _text(path)
    variables: dict[str, Any] = {}
    for name in TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            variables[name] = text
    return Templates(sources, variables)


def _named(value: Any, path: Path) -> dict[str, str]:
    """The spellings in circulation: one string, ``[{"name", "template"}]``, or an object of names."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("name"), item.get("template")) for item in value]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = [(None, None)]
    named = {name: source for name, source in pairs if isinstance(name, str) and isinstance(source, str)}
    if len(named) != len(pairs):
        raise CheckpointError(
            f"{path}: chat_template must be a string, or a list of objects with a name and a template each",
            subject="chat_template",
        )
    return named


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 at byte {error.start}", subject=str(path)) from error


@dataclass(frozen=True)
class RenderLimits:
    """What one render may take. CPU time is the worker's own, so that a busy machine fails nobody."""

    cpu_s: float = 0.25
    compile_cpu_s: float = 2.0
    wall_s: float = 10.0
    start_s: float = 60.0
    max_chars: int = 1 << 20


class Renderer:
    """Renders one model's chats, from any thread and from asyncio. Close it, or leave it to the end of the process.

    ``n_workers`` renders run at once; more wait for their turn. Workers start when they are first needed.
    """

    def __init__(
        self,
        templates: Templates,
        *,
        n_workers: int = 2,
        limits: RenderLimits | None = None,
        clock: clocks.Clock = clocks.SYSTEM,
    ) -> None:
        self.templates = templates
        self.limits = limits or RenderLimits()
        self._clock = clock
        self._idle: queue.LifoQueue[LineWorker] = queue.LifoQueue()
        self._workers = [
            LineWorker(
                "chat template worker", template_worker.__file__, hello=HELLO, clock=clock, start_s=self.limits.start_s
            )
            for _ in range(n_workers)
        ]
        for worker in reversed(self._workers):
            self._idle.put(worker)

    def check(self) -> None:
        """Start a worker and compile every template. Raises ``CheckpointError`` naming one that does not compile."""
        for name, source in self.templates.sources.items():
            reply = self._ask(source, None, self.limits.compile_cpu_s)
            if reply is None or "error" in reply:
                reason = "it takes too long to compile" if reply is None else reply["message"]
                raise CheckpointError(f"chat template {name!r} is damaged: {reason}", subject=name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens written out.

        ``template`` names one of the model's templates, ``variables`` are further values that the template reads (such
        as ``enable_thinking``). Raises ``RequestError``: no template, refused by the template, failed, over a limit.
        """
        source = self.templates.choose(template, tools=bool(tools))
        data = {
            **self.templates.variables,
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        reply = self._ask(source, data, self.limits.cpu_s)
        if reply is None or reply.get("error") == "limit":
            raise RequestError(
                f"the chat template took more than {self.limits.cpu_s:g} s, {self.limits.max_chars} characters or "
                f"{template_worker.HEADROOM_BYTES >> 20} MiB on this conversation",
                param="messages",
                code="template_limit",
            )
        if "error" in reply:
            refused = reply["error"] == "refused"
            raise RequestError(
                f"the chat template {'refuses the conversation' if refused else 'failed'}: {reply['message']}",
                param="messages",
                code="template_refused" if refused else "template_failed",
            )
        return reply["text"]

    async def render_async(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """``render`` without blocking the event loop."""
        return await to_thread(self.render, messages, **options)

    def _ask(self, source: str, data: Mapping[str, Any] | None, cpu_s: float) -> dict[str, str] | None:
        request = {
            "template": source,
            "data": data,
            "now_s": self._clock.wall_s(),
            "cpu_s": cpu_s,
            "max_chars": self.limits.max_chars,
        }
        worker = self._idle.get()
        try:
            # A character is at most twelve bytes of JSON (two escapes of six).
            return worker.ask(request, self.limits.wall_s, 12 * self.limits.max_chars + (1 << 16))
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. A later render starts them anew."""
        for _ in self._workers:
            self._idle.get().kill()
        for worker in self._workers:
            self._idle.put(worker)
