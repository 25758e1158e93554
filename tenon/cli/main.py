"""``tenon JOB ...``: the table of jobs, and what is common to all of them.

A job is a module with ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status). Only the job that was
asked for is imported, so that ``tenon --help`` is quick. Exit status: 0 done, 1 the job's own no (a check failed),
2 wrong usage or an error of Tenon's tree, printed as one sentence, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from tenon import __version__
from tenon.base.errors import TenonError


class JobModule(Protocol):
    """What a job's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


@dataclass(frozen=True)
class Job:
    """A row of the table: the module that does it and one line of help."""

    module: str
    help: str


JOBS = {
    "serve": Job("tenon.cli.serve", "serve a model over an OpenAI-compatible API"),
    "batch": Job("tenon.cli.batch", "answer a file of requests, OpenAI's batch JSONL, and go on where it was stopped"),
    "explain": Job("tenon.cli.explain", "say where a request's time went, from the records that a server keeps"),
    "load": Job("tenon.cli.load", "send a trace to a server as it would arrive, and report the latencies"),
    "workload": Job("tenon.cli.workload", "make, read and describe request traces"),
    "simulate": Job("tenon.cli.simulate", "serve a trace in virtual time, on a device that need not be here"),
    "device": Job("tenon.cli.device", "devices of the cost model; measure this machine"),
    "bench": Job("tenon.cli.bench", "measure claims: list, run, verify and compare benches"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; the console script's entry."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="tenon", description="Serve, compile and train open-weight language models.")
    parser.add_argument("--version", action="version", version=f"tenon {__version__}")
    jobs = parser.add_subparsers(metavar="JOB", required=True)
    # Options before the job are --version and --help alone, so the first plain word is the job.
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, job in JOBS.items():
        sub = jobs.add_parser(name, help=job.help, description=job.help[0].upper() + job.help[1:] + ".")
        if name == asked:
            module = cast(JobModule, import_module(job.module))
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except TenonError as error:
        print(f"tenon: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
