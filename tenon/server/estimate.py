"""What might be expected of a request, without serving it: ``/v1/estimate``, and who waits for the engine's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from tenon.base.errors import RequestError
from tenon.engine import messages as m
from tenon.server.failures import Refusal
from tenon.server.limits import Limits
from tenon.server.protocol import ChatRequest, CompletionRequest, json_object, parse_chat, parse_completion

PATH: Final = "/v1/estimate"
PATIENCE_S: Final = 10.0
"""The engine answers between two steps."""
MOST_WAITING: Final = 64
"""Estimates at one time: each costs the engine a look at its cache."""


def parse_estimate(body: bytes, limits: Limits) -> ChatRequest | CompletionRequest:
    """The body is that of chat, which has ``messages``, or of completions. Raises ``RequestError`` naming the field."""
    raw = json_object(body)
    if ("messages" in raw) == ("prompt" in raw):
        said = "an estimate is of a body of chat, which has messages, or of completions, which has a prompt"
        raise RequestError(f"{said}; this one has {'both' if 'prompt' in raw else 'neither'}", param="messages")
    if "messages" in raw:
        return parse_chat(body, limits)
    request = parse_completion(body, limits)
    if (n_prompts := len(request.prompts)) > 1:
        raise RequestError(f"prompt must be one prompt for an estimate, got {n_prompts}", param="prompt")
    return request


class Estimates:
    """Questions that the engine has not answered yet."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._waiting: dict[str, asyncio.Future[m.Estimated]] = {}

    async def answer(self, request_id: str, ask: Callable[[], None]) -> m.Estimated:
        """Of the request that ``ask`` asks the engine about. Raises ``Refusal``: what the engine would refuse it with,
        429 where too many wait, 503 where the engine has ended or does not answer."""
        if len(self._waiting) >= MOST_WAITING:
            said = f"{MOST_WAITING} estimates are waited for already, which is the limit"
            raise Refusal(said, status=429, code="rate_limit_exceeded", retry_after_s=1.0)
        future: asyncio.Future[m.Estimated] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            ask()
            async with asyncio.timeout(self._patience_s):
                told = await future
        except TimeoutError:
            said = f"the engine did not answer within {self._patience_s:g} s"
            raise Refusal(said, status=503, code="engine_busy", retry_after_s=1.0) from None
        finally:
            self._waiting.pop(request_id, None)
        if told.refused is not None:
            raise refusal(told.refused, told.refused.retry_after_s)
        return told

    def take(self, told: m.Estimated) -> None:
        """The engine has answered; nothing happens where nobody waits any more."""
        future = self._waiting.get(told.request_id)
        if future is not None and not future.done():
            future.set_result(told)

    def lose(self, message: str) -> None:
        """The engine has ended."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Refusal(message, status=503, code="engine_dead", retry_after_s=1.0))


def refusal(message: m.Rejected, retry_after_s: float | None) -> Refusal:
    """What the client is told of what the engine has refused."""
    return Refusal(
        message.message, status=message.status, code=message.code, param=message.param, retry_after_s=retry_after_s
    )


def estimate_json(add: m.Add, told: m.Estimated) -> dict[str, Any]:
    """The answer. Raises ``Refusal`` where the engine said nothing."""
    forecast = told.forecast
    if forecast is None:
        raise Refusal("the engine has no forecast of this request", status=503, code="engine_busy", retry_after_s=1.0)
    return {
        "ttft_ms": round(forecast.ttft_s * 1e3, 3),
        "tpot_ms": round(forecast.tpot_s * 1e3, 3),
        "tokens_per_s": round(1 / forecast.tpot_s, 3) if forecast.tpot_s > 0 else None,
        "prompt_tokens": len(add.prompt),
        "hit_tokens": forecast.hit_tokens,
        "confidence": forecast.confidence,
        "meets_slo": forecast.meets if add.slo is not None and add.slo.promises else None,
        "queue": {"running": told.running, "waiting": told.waiting},
    }
