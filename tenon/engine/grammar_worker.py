"""The process in which xgrammar runs: what a stranger's grammar does to it costs that grammar's request alone.

It reads JSON lines and answers each with one. The first says which model's vocabulary it is for; then come

    {"compile": kind, "source", "cpu_s"}                       -> {"compiled"} or {"error"}
    {"fill": [[sequence, grammar, n, tokens, nodes], ...],     -> {"errors": {sequence: message}}
     "cpu_s", "grammars": {name: compiled}, "drop": [sequences], "drop_grammars": [names]}

A fill takes each sequence, known to have ``n`` tokens in its matcher (0: a new matcher), further by ``tokens`` and
writes the mask of what may follow into the next row of the shared memory; after it a row for each of ``nodes``, pairs
of parent (-1: the sequence) and token, of what may follow the path down to it. The matcher comes back to where it was.

The libraries are loaded once. A child that is forked afterwards does the work within limits on CPU time, memory,
files and processes; when it ends by one of them the answer is ``{"killed"}``, and another child, which knows nothing
of what was before, is there at once.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

HEADROOM_BYTES: Final = 1 << 30
MAX_SPACES: Final = 16
"""Between two elements of a JSON text: a model must not go on with blanks for ever."""
_ANY_OBJECT: Final = '{"type": "object"}'
_PR_SET_PDEATHSIG: Final = 1
_PLACE: Final = re.compile(r"^(\[[\d:]+\] )?\S+\.(cc|h):\d+: ")


class Grammars:
    """One vocabulary, and what there is of grammars and matchers over it."""

    def __init__(
        self, folder: str, vocab_size: int, stop_ids: list[int], masks: NDArray[np.int32], warnings: int
    ) -> None:
        """``warnings``: the end of a pipe into which the library writes them."""
        import xgrammar

        from tenon.models.tokenizer import CALL_MARKS, load_tokenizer

        tokenizer = load_tokenizer(Path(folder), vocab_size)
        # Special tokens are written as nothing, by which xgrammar knows them.
        special = tokenizer.special_ids - {tokenizer.token_id(mark) for mark in CALL_MARKS}
        words = [b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._x = xgrammar
        self._info = xgrammar.TokenizerInfo(
            words, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=stop_ids
        )
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        self._masks, self._warnings = masks, warnings
        self._grammars: dict[str, Any] = {}
        self._matchers: dict[int, Any] = {}

    def compile(self, kind: str, source: str, *, probe: bool, exact: bool) -> dict[str, Any]:
        """``probe``: make the first mask too, which shows whether any can be made. ``exact``: what the library warns of
        is an error, for it warns of what it does not keep."""
        _drain(self._warnings)
        compiler, spaces = self._compiler, MAX_SPACES
        try:
            match kind:
                case "json_schema":
                    compiled = compiler.compile_json_schema(source, max_whitespace_cnt=spaces)
                case "json_object":
                    compiled = compiler.compile_json_schema(_ANY_OBJECT, max_whitespace_cnt=spaces, strict_mode=False)
                case "regex":
                    compiled = compiler.compile_regex(source)
                case "ebnf":
                    compiled = compiler.compile_grammar(source)
                case "tags":
                    compiled = compiler.compile_structural_tag(source)
                case _:
                    return {"error": f"there is no kind {kind!r}"}
            if probe and self._x.GrammarMatcher(compiled).fill_next_token_bitmask(self._masks, 0):
                if not self._masks[0].any():
                    return {"error": "there is no text of this form"}
        except Exception as error:  # whatever a library says about a stranger's text is an answer
            return {"error": _first_line(error)}
        warned = [line for line in _drain(self._warnings).splitlines() if "Warning: " in line]
        if exact and warned:
            return {
                "error": f"this cannot be kept exactly: {_PLACE.sub('', warned[0]).removeprefix('Warning: ')[:400]}"
            }
        return {"compiled": compiled.serialize_json()}

    def fill(self, request: dict[str, Any]) -> dict[str, Any]:
        for sequence in request["drop"]:
            self._matchers.pop(sequence, None)
        for name in request["drop_grammars"]:
            self._grammars.pop(name, None)
        for name, compiled in request["grammars"].items():
            self._grammars[name] = self._x.CompiledGrammar.deserialize_json(compiled, self._info)
        errors: dict[str, str] = {}
        row = 0
        for sequence, name, n, tokens, nodes in request["fill"]:
            first, row = row, row + 1 + len(nodes)
            try:
                if n == 0:
                    self._matchers[sequence] = self._x.GrammarMatcher(self._grammars[name])
                matcher = self._matchers[sequence]
                if not all(matcher.accept_token(token) for token in tokens):
                    raise ValueError("the output has left its grammar")
                self._write(matcher, first)
                if nodes:
                    self._write_nodes(matcher, first + 1, nodes)
            except Exception as error:
                errors[str(sequence)] = _first_line(error)
        return {"errors": errors}

    def _write(self, matcher: Any, row: int) -> None:
        if not matcher.fill_next_token_bitmask(self._masks, row):
            self._masks[row] = -1

    def _write_nodes(self, matcher: Any, first: int, nodes: list[tuple[int, int]]) -> None:
        """Rows from ``first`` on. What the grammar does not take, and what is below it, gets an empty mask."""
        at: list[int] = []
        taken: set[int] = set()
        for i, (parent, token) in enumerate(nodes):
            self._masks[first + i] = 0
            if parent >= 0 and parent not in taken:
                continue
            path = [i]
            while nodes[path[-1]][0] >= 0:
                path.append(nodes[path[-1]][0])
            path.reverse()
            common = next(
                (k for k, (a, b) in enumerate(zip(at, path, strict=False)) if a != b), min(len(at), len(path))
            )
            if len(at) > common:
                matcher.rollback(len(at) - common)
                del at[common:]
            for node in path[common:-1]:
                matcher.accept_token(nodes[node][1])
                at.append(node)
            if not matcher.is_terminated() and matcher.accept_token(token):
                at.append(i)
                taken.add(i)
                self._write(matcher, first + i)
        if at:
            matcher.rollback(len(at))


def _drain(descriptor: int) -> str:
    """What is in a pipe."""
    found = b""
    try:
        while piece := os.read(descriptor, 1 << 16):
            found += piece
    except BlockingIOError:
        pass
    return found.decode(errors="replace")


def _first_line(error: Exception) -> str:
    """What a library says, without where in its own source it says it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return _PLACE.sub("", lines[-1] if lines else type(error).__name__).strip()[:500]


def confine() -> None:
    """No core dumps, files, children; ``HEADROOM_BYTES`` more address space than now; no life after the parent's."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    with open("/proc/self/statm", "rb") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))


def serve(grammars: Grammars, source: BinaryIO, sink: BinaryIO, at_work: NDArray[np.int64]) -> None:
    """Answer until the end of the input. The CPU timer's signal, which nobody handles, ends what takes too long."""
    for line in iter(source.readline, b""):
        request = json.loads(line)
        at_work[0] = request["number"]
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        if "fill" in request:
            reply = grammars.fill(request)
        else:
            reply = grammars.compile(
                request["compile"], request["source"], probe=request["probe"], exact=request["exact"]
            )
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(sink, reply | {"number": request["number"]})


def _write(sink: BinaryIO, reply: dict[str, Any]) -> None:
    sink.write(json.dumps(reply).encode() + b"\n")
    sink.flush()


def main(descriptor: int, n_rows: int) -> None:
    """Load, then have one child after another serve. ``descriptor``: of the memory for masks, -1 where none are to be
    made."""
    source = os.fdopen(0, "rb", buffering=0)  # what a buffer holds here each child would hold, and answer again
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    warnings, said = os.pipe()
    os.set_blocking(warnings, False)
    os.set_blocking(said, False)  # what does not fit is not waited for
    os.dup2(said, 2)
    hello = json.loads(source.readline())
    n_words = -(-hello["vocab_size"] // 32)
    memory: mmap.mmap | bytearray = bytearray(4 * n_rows * n_words)
    if descriptor >= 0:
        memory = mmap.mmap(descriptor, 4 * n_rows * n_words)
    masks = np.frombuffer(memory, np.int32).reshape(n_rows, n_words)
    try:
        grammars = Grammars(hello["folder"], hello["vocab_size"], hello["stop_ids"], masks, warnings)
    except ImportError as error:
        _write(sink, {"refused": f"{error.name or error} is not installed; pip install 'tenon[structured]'"})
        return
    _write(sink, {})
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    at_work = np.frombuffer(mmap.mmap(-1, 8), np.int64)  # shared: the number of the request that a child died of
    while True:
        child = os.fork()
        if child == 0:
            confine()
            with os.fdopen(0, "rb") as buffered:
                serve(grammars, buffered, sink, at_work)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
        _write(sink, {"killed": killed, "number": int(at_work[0])})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
