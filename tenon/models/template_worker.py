"""The process that renders chat templates: code of strangers, so it runs apart and can be killed.

It reads JSON lines ``{"template", "data", "now_s", "cpu_s", "max_chars"}`` (``data`` null: compile only), answers each
with ``{"text"}`` or ``{"error", "message"}``. Templates run in jinja2's immutable sandbox with what Hugging Face
templates expect: ``tojson``, ``raise_exception``, ``strftime_now``, loop controls, ``generation`` blocks.

Before the first request it gives up what it does not need: new files, children, more than ``HEADROOM_BYTES`` of further
memory. A CPU timer whose signal nobody handles ends it when one request takes too long, even inside C; the end of its
input ends it with its parent. It is started by path and imports nothing of the package.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, Final, NoReturn

import jinja2
import jinja2.debug  # loaded on the first error otherwise, when no file can be opened any more
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

HEADROOM_BYTES: Final = 64 << 20
"""Address space above what the warm process has."""


class TemplateRefusal(jinja2.TemplateError):
    """The template itself called ``raise_exception``: the conversation is not one that it takes."""


class GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """A namespace without underscored names: they would reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            PlainNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError("a namespace has no underscored names")


class PlainDict:
    """``dict`` for templates: it makes dictionaries and has no attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face templates are written for."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["namespace"] = PlainNamespace
    made.globals["dict"] = PlainDict()
    del made.globals["lipsum"]
    return made


ENVIRONMENT: Final = environment()


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(template)


def render(template: str, data: dict[str, Any], now_s: float, max_chars: int) -> str:
    """The text; ``now_s`` is the wall clock that ``strftime_now`` shows, in local time. Raises jinja2's errors."""

    def strftime_now(form: str) -> str:
        return datetime.datetime.fromtimestamp(now_s).strftime(form)

    parts: list[str] = []
    n_chars = 0
    for part in compiled(template).generate({**data, "strftime_now": strftime_now}):
        n_chars += len(part)
        if n_chars > max_chars:
            raise MemoryError
        parts.append(part)
    return "".join(parts)


def answer(line: bytes) -> bytes:
    """One request's answer as a JSON line. What the template raises is the request's error, whatever its type."""
    request = json.loads(line)
    template, data = request["template"], request["data"]
    signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
    try:
        if data is None:
            compiled(template)
            reply = {"text": ""}
        else:
            reply = {"text": render(template, data, request["now_s"], request["max_chars"])}
    except TemplateRefusal as error:
        reply = {"error": "refused", "message": str(error)[:1000]}
    except jinja2.TemplateSyntaxError as error:
        reply = {"error": "syntax", "message": f"{error.message} at line {error.lineno}"[:1000]}
    except (MemoryError, RecursionError, OverflowError) as error:
        reply = {"error": "limit", "message": type(error).__name__}
    except Exception as error:  # any operation of a template may fail, with any type
        reply = {"error": "failed", "message": f"{type(error).__name__}: {error}"[:1000]}
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    reply["number"] = request.get("number", 0)
    return json.dumps(reply).encode() + b"\n"


def confine() -> None:
    """No core dumps, files, children, descriptors; ``HEADROOM_BYTES`` more address space than now (Linux)."""
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(limit, (most, most))


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warm = "{% for m in messages %}{{ m | tojson }}{{ strftime_now('%d %b %Y') }}{% endfor %}{{ nothing.at.all }}"
    answer(json.dumps({"template": warm, "data": {"messages": [1]}, "now_s": 0, "cpu_s": 9, "max_chars": 99}).encode())
    confine()
    for line in iter(source.readline, b""):
        sink.write(answer(line))
        sink.flush()


if __name__ == "__main__":
    main()
