"""The child process that holds one contender: ``python -m tenon.bench.contender MODULE:CLASS OPTIONS_JSON``.

One JSON object a line. Asked on stdin: ``{"do": "setup", "cell": {...}}``, ``{"do": "sample"}``, ``{"do": "quit"}``.
Answered: ``{"ok": {...}}``, for a sample its metrics, or ``{"error": "...", "trace": "..."}``, after which the process
ends. What the contender prints goes to stderr, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any, BinaryIO, Protocol, cast

from tenon.base.errors import ConfigError, ProtocolError


class Contender(Protocol):
    """One thing that is measured."""

    def setup(self, cell: dict[str, Any]) -> None:
        """Get ready for a cell: load, compile. Called once, before any sample."""
        ...

    def sample(self) -> dict[str, float]:
        """Do the work once; return its metrics, the same names each time."""
        ...

    def close(self) -> None:
        """Release what was taken; no call follows."""
        ...


def make(entry: str, options: dict[str, Any]) -> Contender:
    """Import ``module:Class`` and construct it. Raises ``ConfigError`` when there is no such class."""
    module_name, colon, class_name = entry.partition(":")
    if not colon:
        raise ConfigError(f"a contender's entry is module:Class, got {entry!r}", subject=entry)
    kind = getattr(importlib.import_module(module_name), class_name, None)
    if kind is None:
        raise ConfigError(f"module {module_name} has no class {class_name}", subject=entry)
    return cast(Contender, kind(**options))


def serve(entry: str, options: dict[str, Any], asked: BinaryIO, answers: BinaryIO) -> int:
    """Answer until told to quit or until the asker is gone; 0, or 1 after an error."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    try:
        contender = make(entry, options)
        for line in asked:
            message = json.loads(line)
            match message.get("do"):
                case "setup":
                    contender.setup(message["cell"])
                    answer({"ok": {}})
                case "sample":
                    answer({"ok": contender.sample()})
                case "quit":
                    break
                case other:
                    raise ProtocolError(f"a contender is asked for setup, sample or quit, not {other!r}")
        contender.close()
    except Exception as error:  # whatever it is, it is handed to the parent, which raises it
        answer({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
        return 1
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise ConfigError(f"usage: python -m tenon.bench.contender MODULE:CLASS OPTIONS_JSON, got {arguments}")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(arguments[0], json.loads(arguments[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
