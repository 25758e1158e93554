"""What a request must satisfy before it is queued, whoever sent it."""

from __future__ import annotations

from collections.abc import Iterable

from tenon.base.errors import ContextTooLong, RequestError
from tenon.engine.embed import check_embed
from tenon.engine.messages import Add


def check(add: Add, vocab_size: int, max_model_len: int, max_sequences: int) -> None:
    """Raises ``RequestError``, or ``ContextTooLong``, naming the field."""
    n_prompt = len(add.prompt)
    if n_prompt == 0:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if add.embed is not None:
        check_embed(add)
    elif add.max_tokens < 1 or add.n < 1:
        message = f"max_tokens and n must be at least 1, got {add.max_tokens} and {add.n}"
        raise RequestError(message, param="max_tokens")
    if add.min_tokens > add.max_tokens:
        message = f"min_tokens must be at most max_tokens, got {add.min_tokens} and {add.max_tokens}"
        raise RequestError(message, param="min_tokens", code="invalid_value")
    if (add.outputs or add.index) and add.n > 1:
        raise RequestError("a sequence goes on alone: n must be 1 with outputs or an index", param="n")
    if len(add.outputs) >= add.max_tokens and add.embed is None:
        message = f"max_tokens must exceed what was generated already, got {add.max_tokens} and {len(add.outputs)}"
        raise RequestError(message, param="max_tokens")
    _require_known("prompt", add.prompt, vocab_size)
    _require_known("outputs", add.outputs, vocab_size)
    _require_known("logit_bias", (token for token, _ in add.logit_bias), vocab_size)
    for word in add.bad_words:
        if not word:
            raise RequestError(
                "a bad word has no tokens; it must have at least one", param="bad_words", code="invalid_value"
            )
        _require_known("bad_words", word, vocab_size)
    if n_prompt + add.max_tokens > max_model_len:
        raise ContextTooLong(n_prompt, add.max_tokens, max_model_len)
    if add.n > max_sequences:
        raise RequestError(f"n must be at most {max_sequences} here, got {add.n}", param="n")


def _require_known(param: str, tokens: Iterable[int], vocab_size: int) -> None:
    bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if bad is not None:
        message = f"token id {bad} is outside the vocabulary of {vocab_size}"
        message = message if param == "prompt" else f"{param}: {message}"
        raise RequestError(message, param=param, code="invalid_value")
