"""The table of old bugs, and the page that is made of it: ``python tests/old_bugs.py`` writes the page."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "old_bugs.toml"
PAGE = ROOT / "docs" / "old-bugs.md"

INTRODUCTION = """\
# Old bugs

What others have published of servers like this one, and what went wrong here, each with what keeps it from happening
and the test that would fail. Ids are those of the project that is named, `#` one of its issues. **M**: `make verify`
brings the bug back in a copy of the tree and sees that test fail.

This page is made of `tests/old_bugs.toml` by `python tests/old_bugs.py`.
"""


@dataclass(frozen=True)
class Mutant:
    """A change that brings a bug back: ``old``, which is in ``file`` once, becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    """A row. ``here`` says what keeps it away, or ``absent`` what there is not."""

    area: str
    ids: tuple[str, ...]
    what: str
    here: str = ""
    absent: str = ""
    test: str = ""
    mutant: Mutant | None = None


def read_bugs(path: Path = TABLE) -> list[Bug]:
    rows = tomllib.loads(path.read_text())["bug"]
    return [
        Bug(**row | {"ids": tuple(row["ids"])} | ({"mutant": Mutant(**row["mutant"])} if "mutant" in row else {}))
        for row in rows
    ]


def page(bugs: list[Bug]) -> str:
    lines = [INTRODUCTION]
    area = ""
    for bug in bugs:
        if bug.area != area:
            area = bug.area
            lines.append(f"\n## {area}\n\n| bug | what happened | here | test |\n|---|---|---|---|\n")
        file, _, function = bug.test.partition("::")
        test = f"`{file}`: `{function}`{' **M**' if bug.mutant else ''}" if bug.test else ""
        lines.append(f"| {', '.join(bug.ids)} | {bug.what} | {bug.here or bug.absent} | {test} |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(read_bugs()))
