"""The request bodies that stand for a trace's contents: token ids, texts, or messages of a chat.

Equal contents give equal tokens and equal text, so what two prompts share in the trace they share on the wire. A text
has one word for each token. The words are common and short, one token each in most vocabularies of byte pairs; where
they are not, the server's own count says how long a prompt really was.

In a chat, what an earlier request answered speaks as the assistant and everything else as the user. The trace knows
outputs only by number; with ``answers`` the text that the server really gave takes their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from tenon.base.errors import ConfigError
from tenon.workloads.trace import Segment, TraceRequest, content_tokens, prompt_tokens

Endpoint = Literal["completions", "chat"]

PATHS: Final[dict[Endpoint, str]] = {"completions": "/completions", "chat": "/chat/completions"}

_COMMON: Final = """
the of and to in is that it for was on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over
did down only way find use may water long little very after words called just where most know get through back
much before go good new write our used me man too any day same right look think also around another came come
work three word must because does part even place well such here take why things help put years different away
again off went old number great tell men say small every found still between name should home big give air line
set own under read last never us left end along while might next sound below saw something thought both few those
always looked show large often together asked house world going want school important until form food keep
children feet land side without boy once animals life enough took sometimes four head above kind began almost
live page got earth need far hand high year mother light parts country father let night following
"""
WORDS: Final = tuple(_COMMON.split())


def text_of(content: int, n: int) -> str:
    """``n`` words, a blank before each: a function of ``content`` alone, longer texts begin with shorter ones."""
    return "".join(" " + WORDS[i] for i in content_tokens(content, n, len(WORDS)).tolist())


def common_ids(vocab_size: int) -> tuple[int, int]:
    """The range of token ids that prompts are drawn from: the first and the last sixteenth are left out, for that is
    where vocabularies keep their special tokens.
    """
    return vocab_size // 16, vocab_size - vocab_size // 16


class Prompts:
    """Makes bodies for one model. ``vocab_size`` 0 asks for texts. ``extra`` goes into every body, over our fields, and
    ``fields`` over these into that of the request with the id."""

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        *,
        vocab_size: int = 0,
        ignore_eos: bool = False,
        chunk_usage: bool = False,
        outputs: Iterable[int] = (),
        extra: Mapping[str, Any] | None = None,
        fields: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """``outputs``: contents that are answers. Raises ``ConfigError`` for token ids in a chat, or too few."""
        if vocab_size and endpoint == "chat":
            raise ConfigError("a chat takes texts; token ids go to the completions endpoint", subject="prompts")
        if vocab_size < 0 or 0 < vocab_size < 16:
            raise ConfigError(f"vocab_size must be at least 16, got {vocab_size}", subject="vocab_size")
        self.endpoint = endpoint
        self._vocab_size = vocab_size
        self._outputs = frozenset(outputs)
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if chunk_usage else {})
        self._fixed: dict[str, Any] = {"model": model, "stream": True, "stream_options": options}
        if ignore_eos:
            self._fixed["ignore_eos"] = True
        self._extra, self._fields = dict(extra or {}), fields or {}

    def body(self, request: TraceRequest, answers: Mapping[int, str] | None = None) -> bytes:
        """The JSON body of one request; ``answers``: contents whose real text is known."""
        prompt: dict[str, Any]
        if self.endpoint == "chat":
            prompt = {"messages": self._messages(request, answers or {})}
        elif self._vocab_size:
            first, end = common_ids(self._vocab_size)
            prompt = {"prompt": prompt_tokens(request, end, first).tolist()}
        else:
            prompt = {"prompt": "".join(_segment(s, answers or {}) for s in request.prompt)}
        own = dict(self._fields.get(request.id, {}))
        return msgspec.json.encode(self._fixed | prompt | {"max_tokens": request.n_output} | self._extra | own)

    def _messages(self, request: TraceRequest, answers: Mapping[int, str]) -> list[dict[str, str]]:
        """Turns that alternate; the user has the first and the last word, which is what templates expect."""
        turns: list[tuple[str, list[str]]] = []
        last = len(request.prompt) - 1
        for i, segment in enumerate(request.prompt):
            is_answer = segment.content in self._outputs and 0 < i < last
            role = "assistant" if is_answer else "user"
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            turns[-1][1].append(_segment(segment, answers))
        # An answer goes back as it came: a blank more or less would be other tokens than those in the server's cache.
        return [
            {"role": role, "content": "".join(texts).removeprefix(" " if role == "user" else "")}
            for role, texts in turns
        ]


def _segment(segment: Segment, answers: Mapping[int, str]) -> str:
    return answers.get(segment.content) or text_of(segment.content, segment.n)
