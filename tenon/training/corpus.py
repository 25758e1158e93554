"""Text that every CPython has: the source of its standard library, split by package.

A document is one ``.py`` file under a header line with its path. Whole packages are held out together
with their tests, so that nothing of them is ever trained on. Tables (a literal that fills most of a file),
files that do not parse and exact duplicates are left out on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from tenon.base.errors import ResourceError

HELD_OUT = ("asyncio", "concurrent", "html", "json", "sqlite3", "tomllib", "wsgiref", "zoneinfo")
"""Packages whose modules, and whose tests in ``test``, are for evaluation alone."""

SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib2to3"})
TABLE_SHARE = 0.5
MIN_BYTES = 64
LITERALS = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant)


@dataclass(frozen=True)
class Document:
    """One source file; ``path`` is relative to the standard library, with forward slashes."""

    path: str
    text: str

    @property
    def framed(self) -> str:
        """The text as the model reads it: a header line with the path, then the file."""
        return f"# Lib/{self.path}\n{self.text}"

    @property
    def package(self) -> str:
        """The held-out package that this document belongs to, or '' when it is for training."""
        return held_out_package(self.path)


@dataclass(frozen=True)
class Corpus:
    """Both splits in order of path, and what was left out: reason -> number of files."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: dict[str, int]
    has_tests: bool


def held_out_package(path: str) -> str:
    """Which of ``HELD_OUT`` the file at ``path`` belongs to, as module or as test; '' when to none."""
    parts = path.removesuffix(".py").split("/")
    for name in HELD_OUT:
        if parts[0] in (name, f"_{name}"):
            return name
        if parts[0] == "test" and len(parts) > 1 and parts[1].startswith(f"test_{name}"):
            return name
    return ""


def is_table(tree: ast.Module, n_lines: int) -> bool:
    """Whether literal containers assigned at top level fill more than half of the file."""
    filled = 0
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, LITERALS):
            filled += (node.end_lineno or node.lineno) - node.lineno + 1
    return filled > TABLE_SHARE * n_lines and filled > 40


def _reason_to_skip(text: str) -> str:
    if len(text) < MIN_BYTES:
        return "shorter than 64 characters"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test suite is full of deliberate oddities
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return "does not parse"
    return "table" if is_table(tree, text.count("\n") + 1) else ""


def load(root: Path | None = None) -> Corpus:
    """Read the standard library under ``root`` (this interpreter's when ``None``).

    Raises ``ResourceError`` when the source is not there (a stripped or zipped installation).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    if not (root / "asyncio" / "__init__.py").is_file():
        raise ResourceError(
            f"{root} holds no source of the standard library (asyncio/__init__.py is missing); "
            f"install a CPython that ships its Lib folder as .py files.",
            subject=str(root),
        )
    train: list[Document] = []
    held: list[Document] = []
    skipped: dict[str, int] = {}
    seen: set[bytes] = set()

    def skip(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        if SKIPPED_PARTS & set(path.split("/")) or path.startswith(("config-", "_sysconfigdata")):
            continue
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        if digest in seen:
            skip("duplicate")
            continue
        seen.add(digest)
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            skip("not UTF-8")
            continue
        if reason := _reason_to_skip(text):
            skip(reason)
            continue
        document = Document(path, text)
        (held if document.package else train).append(document)
    return Corpus(tuple(train), tuple(held), skipped, has_tests=(root / "test" / "test_dict.py").is_file())
