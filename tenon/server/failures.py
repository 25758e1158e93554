"""How a failure becomes an HTTP answer: one table from errors to status, type and headers."""

from __future__ import annotations

import math
from typing import Final

from tenon.base.errors import Overloaded, RequestError, TenonError
from tenon.server.limits import BodyTooLarge, error_body


class Refusal(RequestError):
    """A request that gets this HTTP status; ``retry_after_s`` says when it may be worth trying again."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.retry_after_s = retry_after_s


_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def status_of(error: TenonError) -> int:
    """The HTTP status that fits."""
    match error:
        case Refusal():
            return error.status
        case BodyTooLarge():
            return 413
        case Overloaded():
            return 429
        case RequestError():
            return 400
        case _:
            return 500


def body_of(error: TenonError) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object for an answer or for an event in a stream."""
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else "internal_error"
    return error_body(str(error), kind=kind, param=param, code=code)


def headers_of(error: TenonError) -> dict[str, str]:
    """``Retry-After`` in whole seconds, and in milliseconds as the official client reads it first."""
    retry_after_s = error.retry_after_s if isinstance(error, Refusal | Overloaded) else None
    if retry_after_s is None:
        return {}
    return {"retry-after": str(math.ceil(retry_after_s)), "retry-after-ms": str(math.ceil(retry_after_s * 1000))}
