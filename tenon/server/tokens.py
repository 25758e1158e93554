"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: the model's tokenizer for clients that count or score.

Shapes are vLLM's, which lm-evaluation-harness and others read. They answer as soon as the tokenizer is loaded, whether
or not the engine is.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from tenon.base.errors import ContextTooLong, RequestError
from tenon.server.limits import Limits
from tenon.server.model_text import ModelText
from tenon.server.protocol import Message, check_messages, convert, json_object

INLINE_CHARS: Final = 4096
"""Texts up to this size are tokenised on the event loop; longer ones in a thread."""
LONG_CHARS: Final = 2**20
"""Larger ones take their turn: the tokenizer needs some hundred bytes a token."""
PROBE_CHARS: Final = 8
"""So many per token that the context has are looked at first: few texts have longer tokens on average."""
PROBE_SLACK: Final = 16
"""Tokens by which a beginning may have more than it has as part of the whole."""


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``prompt``, or the ``messages`` of a chat as its template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    """What the model wants around a text; by default with a prompt and not with messages, whose template writes it."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


def parse_tokenize(body: bytes, limits: Limits) -> TokenizeRequest:
    """Raises ``RequestError`` naming the field."""
    raw = json_object(body)
    check_messages(raw, limits)
    request = convert(raw, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt", code="missing_parameter")
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises ``RequestError`` naming the field."""
    return convert(json_object(body), DetokenizeRequest)


async def ids_of(text: ModelText, prompt: str, *, special: bool, most: int | None = None) -> list[int]:
    """Tokens of a text. A long one does not hold the event loop up, and very long ones come one after another.

    Raises ``ContextTooLong``, where a beginning of the text already has more than ``most`` tokens.
    """
    if len(prompt) <= INLINE_CHARS:
        return text.encode(prompt, special=special)
    if most is not None and (start := _start(prompt, most * PROBE_CHARS)):
        n_least = len(await asyncio.to_thread(text.encode, start, special=False)) - PROBE_SLACK
        if n_least > most:
            raise ContextTooLong(n_least, 0, most, at_least=True)
    if len(prompt) <= LONG_CHARS:
        return await asyncio.to_thread(text.encode, prompt, special=special)
    async with text.long_texts:
        return await asyncio.to_thread(text.encode, prompt, special=special)


def _start(prompt: str, n_chars: int) -> str:
    """So much of a much longer text, up to a blank, for tokens do not reach over one into the next word; or nothing."""
    if len(prompt) <= 2 * n_chars:
        return ""
    return prompt[: max(0, prompt.rfind(" ", 0, n_chars), prompt.rfind("\n", 0, n_chars))]


async def tokenize(text: ModelText, request: TokenizeRequest, max_model_len: int | None) -> dict[str, Any]:
    """The answer of ``/tokenize``. Raises ``RequestError``."""
    if request.messages is not None:
        flat = [message.flat(i) for i, message in enumerate(request.messages)]
        prompt = await text.render(flat, add_generation_prompt=request.add_generation_prompt)
    else:
        prompt = request.prompt or ""
    special = request.add_special_tokens
    ids = await ids_of(text, prompt, special=request.messages is None if special is None else special)
    names = [text.token_text(token) for token in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": names}


async def detokenize(text: ModelText, request: DetokenizeRequest) -> dict[str, Any]:
    """The answer of ``/detokenize``. Raises ``RequestError`` for an id that the tokenizer does not have."""
    n = text.tokenizer.vocab_size
    bad = next((token for token in request.tokens if not 0 <= token < n), None)
    if bad is not None:
        raise RequestError(f"token id {bad} is outside the vocabulary of {n}", param="tokens", code="invalid_value")
    return {"prompt": await asyncio.to_thread(text.tokenizer.decode, request.tokens, skip_special=False)}


def tokenizer_info(text: ModelText) -> dict[str, Any]:
    """The answer of ``/tokenizer_info``."""
    it = text.tokenizer
    sources = text.renderer.templates.sources
    return {
        "vocab_size": it.vocab_size,
        "bos_token": it.bos_token,
        "eos_token": it.eos_token,
        "pad_token": it.pad_token,
        "chat_template": sources.get("default"),
    }
