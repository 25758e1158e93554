"""The embedded pair's card: what was measured on the exported files, as JSON, as a page, as a picture."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from tenon.base import files
from tenon.base.errors import ConfigError
from tenon.models.checkpoint import WEIGHTS, load_decoder
from tenon.models.decoder import Decoder
from tenon.training import checkpoint, corpus, evaluation, loop
from tenon.training.evaluation import Score
from tenon.training.tokenizer import END_OF_TEXT, special_id

N_DRAFT = 4


def write(folder: Path, state: Path, stride: int, seed: int, console: Console) -> None:
    """Evaluate ``folder/target`` and ``folder/draft`` on the held-out packages; write ``card.json`` and its page."""
    target, draft = (load_decoder(folder / name, dtype=torch.float32).eval() for name in ("target", "draft"))
    vocabulary = Tokenizer.from_file(str(folder / "target" / "tokenizer.json"))
    read = corpus.load()
    held = list(read.held_out)
    end = special_id(vocabulary, END_OF_TEXT)
    stream = torch.tensor([t for d in held for t in (end, *vocabulary.encode(d.framed).ids)])
    accepted = evaluation.acceptance(target, draft, stream, n_windows=32, window=512, n_draft=N_DRAFT, seed=seed)
    card: dict[str, Any] = {
        "command": "python -m tenon.training.recipes.embedded all",
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "data": {
            "train_files": len(read.train),
            "train_bytes": sum(len(d.text.encode()) for d in read.train),
            "held_out_packages": list(corpus.HELD_OUT),
            "held_out_files": len(held),
            "held_out_bytes": sum(len(d.text.encode()) for d in held),
            "left_out_files": read.skipped,
        },
        "parameters": {name: m.spec.n_parameters() for name, m in (("target", target), ("draft", draft))},
        "weight_bytes": {name: (folder / name / WEIGHTS).stat().st_size for name in ("target", "draft")},
        "stages": {name: asdict(checkpoint.load(state / name / loop.NEWEST)[2]) for name in _stages(state)},
        "bits_per_byte": bits_per_byte(target, vocabulary, held, stride, console),
        "acceptance": asdict(accepted),
    }
    files.write_json(folder / "card.json", card)
    files.write_text(folder / "README.md", page(card))
    console.print(page(card), markup=False)


def bits_per_byte(
    target: Decoder, vocabulary: Tokenizer, held: list[corpus.Document], stride: int, console: Console
) -> dict[str, Any]:
    """Both views of the held-out text, file by file and package by package, as the card keeps them."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluate", total=len(held) + len(corpus.HELD_OUT))
        by_file = evaluation.score_files(target, vocabulary, held, stride, lambda: bar.advance(task))
        by_package = evaluation.score_packages(target, vocabulary, held, stride, lambda: bar.advance(task))
    return {
        "window": target.spec.max_position,
        "stride": stride,
        "files_overall": _row(evaluation.overall("all files, each for itself", by_file)),
        "packages_overall": _row(evaluation.overall("all packages, each one stream", by_package)),
        "packages": [_row(s) for s in by_package],
        "files": [_row(s) for s in by_file],
    }


def _stages(state: Path) -> list[str]:
    return [name for name in ("target", "sft", "draft") if (state / name / loop.NEWEST).is_file()]


def _row(score: Score) -> dict[str, Any]:
    kept = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(score).items()}
    return {**kept, "of_xz": round(score.of_xz, 4)}


def _line(row: dict[str, Any]) -> str:
    numbers = " | ".join(f"{row[key]:.3f}" for key in ("model", "gzip", "xz", "of_xz"))
    return f"| {row['name']} | {row['n_bytes']:,} | {numbers} |"


def page(card: dict[str, Any]) -> str:
    """The model card in Markdown."""
    bits, data, accepted = card["bits_per_byte"], card["data"], card["acceptance"]
    target_m, draft_m = (card["parameters"][name] / 1e6 for name in ("target", "draft"))
    window = bits["window"]
    stages = "\n".join(
        f"| {name} | {s['iteration']:,} | {s['tokens'] / 1e6:.1f} M | {s['cpu_s'] / 60:.0f} min |"
        for name, s in card["stages"].items()
    )
    rows = "\n".join(_line(r) for r in (bits["files_overall"], bits["packages_overall"], *bits["packages"]))
    total = sum(card["weight_bytes"].values()) / 1e6
    return f"""# The embedded pair

A target of {target_m:.2f} M parameters and a draft of {draft_m:.2f} M, in Hugging Face format \
(Qwen3, bf16, one tokenizer), {total:.1f} MB of weights together. \
They are here so that everything in Tenon can run without a download; they know a little Python and nothing else.

Trained from scratch by `{card["command"]}` (seed {card["seed"]}, Python {card["python"]}, torch {card["torch"]}, one \
thread of a CPU), each stage stopped where the table says. A schedule that was moved between sittings is part of the \
result: much the same figures come again, the same bits only with the same cuts.

| stage | iterations | tokens | CPU time |
|---|---|---|---|
{stages}

## Data

The source of Python's standard library, {data["train_files"]:,} files, {data["train_bytes"] / 1e6:.1f} MB, under the \
Python Software Foundation License. Held out with their tests, {data["held_out_files"]} files, \
{data["held_out_bytes"] / 1e6:.1f} MB: {", ".join(f"`{p}`" for p in data["held_out_packages"])}. \
Left out on both sides: {", ".join(f"{n} files ({reason})" for reason, n in data["left_out_files"].items())}. \
The supervised pass asks for the training split's functions by docstring, and adds hand-written exchanges.

## Bits per byte on held-out source

Every token counts, over the UTF-8 bytes of the text; windows of {window} tokens that slide by {bits["stride"]}. \
The compressors get the same bytes: `gzip -9`, `xz -9e`. One stream per package lets them repeat what they saw up to \
megabytes before; the model sees {window} tokens back.

| text | bytes | model | gzip | xz | model / xz |
|---|---|---|---|---|---|
{rows}

## The draft

Over {accepted["positions"]:,} held-out positions the draft's first choice is the target's in \
{accepted["agreement"]:.1%}; a token drawn from it at temperature 1 is accepted with {accepted["expected"]:.1%}. \
Greedily, {accepted["accepted_greedy"]:.2f} of {accepted["n_draft"]} drafted tokens are kept on average.

Each file's figures are in `card.json`.
"""


def plot(state: Path, picture: Path) -> None:
    """The loss curves of all stages over their tokens, as SVG. Raises ``ConfigError`` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{picture} needs matplotlib: pip install 'tenon[plot]'.", subject=str(picture)) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tenon"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for stage in _stages(state):
        lines = [json.loads(line) for line in (state / stage / "log.jsonl").read_text().splitlines()]
        axes.plot([r["tokens"] / 1e6 for r in lines], [r["loss"] for r in lines], lw=1, label=stage)
    axes.set(xlabel="tokens, millions", ylabel="training loss, nats per token", ylim=(1.5, 8))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
