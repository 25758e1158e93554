"""The split: nothing of a held-out package is trained on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tenon.base.errors import ResourceError
from tenon.training import corpus

BODY = "def f(x):\n    return x\n" * 5


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "asyncio/__init__.py": BODY + "a = 1\n",
        "asyncio/events.py": BODY + "b = 1\n",
        "argparse.py": BODY + "c = 1\n",
        "copy_of_argparse.py": BODY + "c = 1\n",
        "test/test_dict.py": BODY + "d = 1\n",
        "test/test_asyncio/test_events.py": BODY + "e = 1\n",
        "test/test_json/test_dump.py": BODY + "f = 1\n",
        "test/test_broken.py": "def (:\n" * 20,
        "table.py": "rows = [\n" + "    1,\n" * 60 + "]\n",
        "site-packages/other.py": BODY + "g = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_packages_are_held_out_with_their_tests(library: Path) -> None:
    read = corpus.load(library)
    assert [d.path for d in read.train] == ["argparse.py", "test/test_dict.py"]
    assert {d.package for d in read.held_out} == {"asyncio", "json"}
    assert len(read.held_out) == 4


def test_duplicates_tables_and_broken_files_are_left_out(library: Path) -> None:
    assert corpus.load(library).skipped == {"duplicate": 1, "table": 1, "does not parse": 1}


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("asyncio/events.py", "asyncio"),
        ("test/test_asyncio/test_tasks.py", "asyncio"),
        ("test/test_htmlparser.py", "html"),
        ("test/test_concurrent_futures.py", "concurrent"),
        ("test/test_dict.py", ""),
        ("argparse.py", ""),
        ("asynchat.py", ""),
    ],
)
def test_which_package_holds_a_file_out(path: str, package: str) -> None:
    assert corpus.held_out_package(path) == package


def test_missing_source_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="holds no source of the standard library"):
        corpus.load(tmp_path)


def test_long_literals_make_a_table_and_code_does_not() -> None:
    assert corpus.is_table(ast.parse("x = {\n" + "1: 2,\n" * 50 + "}"), 52)
    assert not corpus.is_table(ast.parse(BODY * 10), 100)
