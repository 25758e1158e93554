"""The one tree of errors that Tenon raises on purpose.

TenonError
├── ConfigError            a setting, option or config field is wrong, unknown or not implemented
├── CheckpointError        a model's files are damaged, incomplete or inconsistent
│   └── UnsupportedModel   the files are fine, the model needs maths that Tenon does not have
├── RequestError           one request cannot be served as asked (HTTP 4xx)
│   ├── ContextTooLong     prompt plus output exceed the model's maximum context length
│   └── Overloaded         the queue is full; ``retry_after_s`` says when to come back
├── ResourceError          memory, disk, port, compiler: the machine lacks something
├── ProtocolError          a peer process sent bytes that are not a valid message
└── IntegrityError         an internal invariant is broken: a bug, never the user's fault

Each carries its subject: the file, tensor, field or request that it is about, the value that was
found and what would be right. ``str(error)`` is one sentence that a user can act upon.
"""

from __future__ import annotations


class TenonError(Exception):
    """Base of every error raised on purpose; ``subject`` names what it is about."""

    def __init__(self, message: str, *, subject: str | None = None) -> None:
        super().__init__(message)
        self.subject = subject


class ConfigError(TenonError):
    """A setting or config field is wrong, unknown, or asks for something not implemented."""


class CheckpointError(TenonError):
    """A model's files are damaged, incomplete or inconsistent with each other."""


class UnsupportedModel(CheckpointError):
    """The files are intact but ask for maths that Tenon does not implement."""


class RequestError(TenonError):
    """One request cannot be served as asked. ``param`` names the field, ``code`` the machine's word."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, subject=param)
        self.param = param
        self.code = code


class ContextTooLong(RequestError):
    """Prompt plus requested output exceed the model's context; keeps the phrase clients match on. ``at_least``: the
    prompt was not counted to its end."""

    def __init__(self, n_prompt: int, n_output: int, limit: int, *, at_least: bool = False) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{'at least ' if at_least else ''}{n_prompt + n_output} tokens ({n_prompt} in the prompt, {n_output} in "
            f"the completion). Please shorten the prompt or lower max_tokens.",
            param="messages",
            code="context_length_exceeded",
        )


class Overloaded(RequestError):
    """There is no room for it now; come back after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float, code: str = "rate_limit_exceeded") -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class ResourceError(TenonError):
    """The machine lacks memory, disk, a port or a compiler."""


class ProtocolError(TenonError):
    """A peer process sent bytes that are not a valid message."""


class IntegrityError(TenonError):
    """An internal invariant is broken. Always a bug in Tenon."""
