"""``tenon explain REQUEST_ID``: where a request's time went, from what ``tenon serve --record DIR`` has written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tenon.base.errors import ConfigError
from tenon.base.records import FILE_NAME, read_records
from tenon.server.outcome import PARTS

Record = dict[str, Any]

_KINDS: Final = re.compile(r"^(chatcmpl|cmpl|resp|msg)-")
"""What ids of answers have before the request's own."""
_WORDS: Final = {
    "to_engine_s": "on its way to the engine",
    "queue_s": "waiting for its turn",
    "again_s": "waiting again, preempted",
    "prefill_s": "computing its prompt",
    "recompute_s": "computing again what it had before it was preempted",
    "missed_s": "computing what the cache had had and evicted",
    "behind_s": "others' rows before its first token",
    "grammar_s": "waiting for its grammar",
    "decode_s": "decoding",
    "prompts_s": "others' prompts while it decoded",
    "guesses_s": "verifying guesses",
    "residual_s": "unexplained",
    "from_engine_s": "on its way back",
}
_WHY: Final = {"new": "new", "evicted": "evicted", "skipped": "there, but beyond a miss"}
_LEAST_S: Final = 1e-6
"""Shorter parts are not shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="an answer's id, or the x-request-id of its headers")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR",
        help="what the server was given as --record (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    console = Console()
    for records in find(args.runs, args.request_id):
        show(console, records)
    return 0


def find(runs: Path, request_id: str) -> list[dict[str, Record]]:
    """Of each prompt of the request its records by kind, from the newest run that has it. Raises ``ConfigError`` where
    none has, or its end is not there yet."""
    paths = sorted(runs.glob(f"*/{FILE_NAME}"), key=lambda path: (path.stat().st_mtime, path), reverse=True)
    for path in paths:
        found: dict[str, dict[str, Record]] = {}
        for record in read_records(path.parent):
            name = record.get("request_id")
            if isinstance(name, str) and _is_meant(request_id, name):
                found.setdefault(name, {})[record["kind"]] = record
        ended = [records for records in found.values() if "finished" in records]
        if found and not ended:
            raise ConfigError(f"the request {request_id!r} has begun in {path.parent} and has not ended there")
        if ended:
            return ended
    where = f"{len(paths)} runs under {runs}" if paths else f"no run under {runs}"
    said = f"the request {request_id!r} is not known: looked into {where}, which 'tenon serve --record DIR' writes"
    raise ConfigError(said, subject=request_id)


def _is_meant(given: str, name: str) -> bool:
    """Whether the engine's ``name`` for a prompt is that of the request ``given``, however that is written."""
    given = _KINDS.sub("", given)
    request, _, _ = name.rpartition("/")
    return given in (name, request) or re.fullmatch(re.escape(given) + r"-[0-9a-f]{8}", request) is not None


def show(console: Console, records: dict[str, Record]) -> None:
    """One prompt of a request."""
    finished = records["finished"]
    n_prompt = records.get("started", {}).get("n_prompt")
    facts = [f"ended by {finished['reason']}", f"{finished['n_output']} tokens", _s(finished["e2e_s"])]
    facts += [f"{n_prompt} tokens of prompt"] if n_prompt is not None else []
    told = f"{finished['request_id']}: {', '.join(facts)}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    ledger = finished.get("ledger") or records.get("ledger", {}).get("ledger")
    if ledger is None:
        console.print("the engine has not said where its time went", highlight=False)
    else:
        console.print(_table(ledger, finished["e2e_s"]))
    for line in _lines(finished, ledger):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(ledger: Record, e2e_s: float) -> Table:
    table = Table("where the time went", box=None, pad_edge=False)
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    for name in PARTS:
        if abs(ledger[name]) >= _LEAST_S:
            table.add_row(_WORDS[name], _s(ledger[name]), f"{ledger[name] / e2e_s:.1%}" if e2e_s > 0 else "")
    table.add_row("in all", _s(e2e_s), "100.0%")
    return table


def _lines(finished: Record, ledger: Record | None) -> Iterator[str]:
    if slo := finished.get("slo"):
        yield from _promised(slo)
    if ledger is not None:
        if ledger["ahead"]:
            yield f"when it came {ledger['ahead']} others ran or waited"
        if ledger["behind"]:
            waited = ", ".join(f"{one['request_id']} {_s(one['seconds'])}" for one in ledger["behind"])
            yield f"before its first token it waited behind the prompts of {waited}"
        if ledger["gained_s"] > _LEAST_S:
            yield f"guesses gained {_s(ledger['gained_s'])}"
    if cache := finished.get("cache"):
        yield from _cached(cache)


def _promised(slo: Record) -> Iterator[str]:
    kept = "kept" if slo["met"] else "not kept"
    notes = [f"class {slo['class']}"] if slo["class"] else []
    notes += ["strict"] if slo["strict"] else []
    notes += ["served as well as could be: it was not expected to be kept"] if slo["downgraded"] else []
    yield f"what it was promised was {kept}" + (f" ({', '.join(notes)})" if notes else "")
    forecast = slo["forecast"] or {}
    for name, what in (("ttft_ms", "first token within"), ("tpot_ms", "a token every")):
        promised = "nothing promised" if slo[name] is None else f"{what} {_s(slo[name] / 1e3)}"
        values = (("expected", forecast.get(name)), ("came", slo["actual"][name]))
        told = [f"{word} {_s(value / 1e3)}" for word, value in values if value is not None]
        yield f"  {'TTFT' if name == 'ttft_ms' else 'TPOT'}: {', '.join([promised, *told])}"


def _cached(cache: Record) -> Iterator[str]:
    holes = f", with {cache['holes']} holes before some of them" if cache["holes"] else ""
    yield f"the cache had {cache['cached_tokens']} tokens of its prompt{holes}"
    for miss in cache["misses"]:
        why = _WHY.get(miss["kind"], miss["kind"])
        if miss.get("policy"):
            why += f" by {miss['policy']}"
        if miss.get("differs_at") is not None:
            why += f", parting from what is there at {miss['differs_at']}"
        yield f"  missed {miss['start']} to {miss['end']}: {why}"
    if (n_more := cache["n_misses"] - len(cache["misses"])) > 0:
        yield f"  and {n_more} other runs"


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.3g} ms"
