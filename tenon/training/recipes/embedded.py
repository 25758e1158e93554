"""The embedded pair's recipe: from the source of the standard library to two checkpoints and their card.

    python -m tenon.training.recipes.embedded all        every stage, taken up where the state folder left it
    python -m tenon.training.recipes.embedded train      next token of plain source: the target
    python -m tenon.training.recipes.embedded sft        its supervised pass: docstring -> function, small talk
    python -m tenon.training.recipes.embedded draft      the draft, taught by the finished target
    python -m tenon.training.recipes.embedded export     both as Hugging Face folders, loss curve
    python -m tenon.training.recipes.embedded evaluate   bits per byte, acceptance, model card
    python -m tenon.training.recipes.embedded status     how far each stage is

One thread, seeded, resumable: SIGTERM or Ctrl-C saves and ends, the same command goes on. ``--stop`` and
``--decay-at`` may be moved until the decay begins, and after it with ``--from-stable``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from tenon.base import files
from tenon.base.errors import ConfigError, TenonError
from tenon.models.decoder import Decoder
from tenon.models.spec import ModelSpec
from tenon.training import chats, checkpoint, corpus, loop, tokenizer
from tenon.training.chats import Chats
from tenon.training.export import export
from tenon.training.objectives import Lengths, Mixture, NextToken
from tenon.training.optimizers import Rates
from tenon.training.recipes import card, exchanges
from tenon.training.rows import Rows, Tokens
from tenon.training.schedule import Wsd

VOCABULARY, CONTEXT, SEED = 4096, 2048, 20_240_229
HERE = Path(__file__).parents[2] / "models" / "embedded"
PICTURE = Path(__file__).parents[3] / "docs" / "img" / "embedded-loss.svg"
CONSOLE = Console()


TARGET = ModelSpec(
    family="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=192,
    n_layers=12,
    n_heads=3,
    n_kv_heads=1,
    head_dim=64,
    intermediate_size=512,
    max_position=CONTEXT,
    qk_norm=True,
    tie_embeddings=True,
)
DRAFT = replace(TARGET, n_layers=2)


@dataclass(frozen=True)
class Plan:
    """One stage: its schedule in iterations, tokens per iteration, and rows' lengths from which iteration on."""

    schedule: Wsd
    batch_tokens: int
    lengths: Lengths
    rates: Rates


def train_plan(decay_at: int, stop: int, batch_tokens: int) -> Plan:
    """Rows of 512, of 1024 from the decay on, of the whole context in its last third: attention costs least early."""
    late = decay_at + (stop - decay_at) * 2 // 3
    lengths = Lengths(((0, 512), (decay_at, 1024), (late, CONTEXT)))
    return Plan(Wsd(40, decay_at, stop), batch_tokens, lengths, Rates())


def sft_plan(stop: int) -> Plan:
    """Short: a low rate, falling from the start."""
    return Plan(Wsd(10, 10, stop), 4096, Lengths(((0, 512),)), Rates(matrix=1.5e-3, vector=1e-3))


def draft_plan(decay_at: int, stop: int) -> Plan:
    """Lower rates for vectors than the target's: the embedding is the target's own at the start."""
    return Plan(Wsd(10, decay_at, stop), 8192, Lengths(((0, 512), (decay_at, 1024))), Rates(matrix=6e-3, vector=1e-3))


def prepare(state: Path) -> tuple[Tokenizer, list[Tokens]]:
    """The tokenizer and the training documents' tokens, made once and kept in the state folder."""
    vocabulary, packed = state / "tokenizer.json", state / "train.npz"
    if not (vocabulary.is_file() and packed.is_file()):
        state.mkdir(parents=True, exist_ok=True)
        read = corpus.load()
        if not read.has_tests:
            CONSOLE.print("This Python lacks the `test` package: about half of the text is missing.")
        made = tokenizer.train((d.framed for d in read.train), VOCABULARY)
        end = tokenizer.special_id(made, tokenizer.END_OF_TEXT)
        tokens = [np.array([*made.encode(d.framed).ids, end], np.uint16) for d in read.train]
        np.savez(packed, tokens=np.concatenate(tokens), ends=np.cumsum([len(t) for t in tokens]))
        made.save(str(vocabulary))
    with np.load(packed, allow_pickle=False) as stored:
        documents = np.split(stored["tokens"], stored["ends"][:-1])
    return Tokenizer.from_file(str(vocabulary)), documents


def _started(spec: ModelSpec, plan: Plan, folder: Path, seed: int) -> loop.Run:
    model = Decoder(spec)
    loop.initialise(model, seed)
    return loop.Run(model, loop.LoopConfig(plan.schedule, plan.batch_tokens, plan.rates), folder)


def _finished(spec: ModelSpec, folder: Path) -> Decoder:
    """The model of the newest state in ``folder``. Raises ``ConfigError`` when there is none."""
    path = folder / loop.NEWEST
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; run the stage that makes it first.", subject=str(path))
    model = Decoder(spec)
    loop.set_weights(model, checkpoint.load(path)[0])
    return model.eval()


def _go(name: str, run: loop.Run, objective: loop.Objective) -> bool:
    """Run one stage under a progress bar; on a terminal that cannot draw, a line per report."""
    bar = Progress(
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=CONSOLE, disable=not CONSOLE.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(name, total=run.config.schedule.stop, completed=run.progress.iteration, loss="")

        def show(report: loop.Report) -> None:
            text = f"{report.loss:.3f} nats/token"
            bar.update(task, completed=report.iteration, loss=text)
            if not CONSOLE.is_terminal:
                CONSOLE.print(f"{name} {report.iteration}/{run.config.schedule.stop} {text} {report.cpu_s:.0f} s CPU")

        return run.run(objective, show)


def train(args: argparse.Namespace) -> bool:
    """The target on plain source."""
    plan = train_plan(args.decay_at, args.stop, args.batch_tokens)
    _, documents = prepare(args.state)
    run = _started(TARGET, plan, args.state / "target", SEED)
    run.resume(loop.STABLE if args.from_stable else loop.NEWEST)
    objective = NextToken(Mixture(Rows(documents, SEED), plan.lengths, plan.batch_tokens))
    return _go("train", run, objective)


def _chats(vocabulary: Tokenizer) -> Chats:
    return Chats(vocabulary, chats.from_docstrings(corpus.load().train), exchanges.written(), SEED)


def sft(args: argparse.Namespace) -> bool:
    """The supervised pass over the trained target: conversations, and plain text so that it is not forgotten."""
    plan = sft_plan(args.sft_stop)
    vocabulary, documents = prepare(args.state)
    run = _started(TARGET, plan, args.state / "sft", SEED)
    if not run.resume():
        loop.set_weights(run.model, checkpoint.load(args.state / "target" / loop.NEWEST)[0])
    text = Rows(documents, SEED + 1)
    objective = NextToken(Mixture(text, plan.lengths, plan.batch_tokens, _chats(vocabulary), chat_share=0.65))
    return _go("sft", run, objective)


def draft(args: argparse.Namespace) -> bool:
    """The draft: the target's distribution over plain text and conversations."""
    plan = draft_plan(args.draft_decay_at, args.draft_stop)
    vocabulary, documents = prepare(args.state)
    teacher = _finished(TARGET, args.state / "sft")
    run = _started(DRAFT, plan, args.state / "draft", SEED + 2)
    if not run.resume():
        loop.inherit(run.model, teacher, n_layers=1)
    mixture = Mixture(Rows(documents, SEED + 2), plan.lengths, plan.batch_tokens, _chats(vocabulary), chat_share=0.15)
    return _go("draft", run, NextToken(mixture, teacher=teacher, teacher_share=0.9))


def export_pair(args: argparse.Namespace) -> bool:
    """Both models into ``--out``; the target after its supervised pass, or before when there was none yet."""
    vocabulary, _ = prepare(args.state)
    tuned = (args.state / "sft" / loop.NEWEST).is_file()
    total = export(_finished(TARGET, args.state / ("sft" if tuned else "target")), vocabulary, args.out / "target")
    total += export(_finished(DRAFT, args.state / "draft"), vocabulary, args.out / "draft")
    card.plot(args.state, args.picture)
    CONSOLE.print(f"{args.out}: {total / 1e6:.1f} MB of weights{'' if tuned else ', before the supervised pass'}")
    return True


def evaluate(args: argparse.Namespace) -> bool:
    """Measure what was exported, and write its card."""
    card.write(args.out, args.state, stride=args.stride, seed=SEED, console=CONSOLE)
    return True


def status(args: argparse.Namespace) -> bool:
    """One line per stage."""
    for stage in ("target", "sft", "draft"):
        path = args.state / stage / loop.NEWEST
        if path.is_file():
            done = checkpoint.load(path)[2]
            millions = done.tokens / 1e6
            CONSOLE.print(f"{stage:8}{done.iteration} iterations, {millions:.1f} M tokens, {done.cpu_s:.0f} s CPU")
        else:
            CONSOLE.print(f"{stage:8}not begun")
    return True


def everything(args: argparse.Namespace) -> bool:
    """All stages in order; ends early when one was interrupted."""
    return all(stage(args) for stage in (train, sft, draft, export_pair, evaluate))


COMMANDS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "train": train, "sft": sft, "draft": draft, "export": export_pair,
    "evaluate": evaluate, "status": status, "all": everything,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tenon.training.recipes.embedded", description=__doc__.split("\n")[0])
    made.add_argument("command", choices=COMMANDS, help="the stage to run")
    made.add_argument("--state", type=Path, help="state folder (default: $TENON_STATE/embedded)")
    made.add_argument("--out", type=Path, default=HERE, help="where the pair is exported")
    made.add_argument("--picture", type=Path, default=PICTURE, help="where the loss curve is drawn")
    made.add_argument("--decay-at", type=int, default=3000, help="train: iteration at which the rate begins to fall")
    made.add_argument("--stop", type=int, default=4200, help="train: last iteration")
    made.add_argument("--batch-tokens", type=int, default=4096, help="train: tokens per iteration")
    made.add_argument("--from-stable", action="store_true", help="train: go on from the state before the decay")
    made.add_argument("--sft-stop", type=int, default=220, help="sft: iterations")
    made.add_argument("--draft-decay-at", type=int, default=300, help="draft: as --decay-at")
    made.add_argument("--draft-stop", type=int, default=500, help="draft: last iteration")
    made.add_argument("--stride", type=int, default=512, help="evaluate: tokens by which the window slides")
    return made


def main() -> int:
    args = parser().parse_args()
    args.state = args.state or files.state_folder() / "embedded"
    torch.set_num_threads(1)
    loop.keep_heap()
    try:
        return 0 if COMMANDS[args.command](args) else 130
    except TenonError as error:
        print(f"embedded: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    raise SystemExit(main())
