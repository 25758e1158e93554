"""The table of old bugs: each bug once, each test there, each mutant caught."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.old_bugs import PAGE, ROOT, Bug, page, read_bugs

BUGS = read_bugs()
MUTANTS = [bug for bug in BUGS if bug.mutant]


def test_each_bug_stands_once_and_says_what_happened() -> None:
    ids = [name for bug in BUGS for name in bug.ids]
    assert sorted(ids) == sorted(set(ids))
    areas = [bug.area for bug in BUGS]
    assert areas == sorted(areas, key=list(dict.fromkeys(areas)).index)
    for bug in BUGS:
        assert bug.ids
        assert bug.what
        assert bool(bug.here) is not bool(bug.absent)
        assert bug.test or bug.absent


@pytest.mark.parametrize("test", sorted({bug.test for bug in BUGS if bug.test}))
def test_the_named_test_is_there(test: str) -> None:
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text() == page(BUGS), "run: python tests/old_bugs.py"


@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.ids[0])
def test_a_mutant_still_applies(bug: Bug) -> None:
    assert bug.mutant is not None
    assert (ROOT / bug.mutant.file).read_text().count(bug.mutant.old) == 1


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests need, without the large files."""
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "results", "img")
    for name in ("tenon", "tests", "docs", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def run(tree: Path, test: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", test, "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.ids[0])
def test_a_mutant_is_caught(tree: Path, bug: Bug) -> None:
    """Its test passes as it is, and fails when the bug is back: a failure of the test (status 1), no other."""
    assert bug.mutant is not None
    sound = run(tree, bug.test)
    assert sound.returncode == 0, sound.stdout
    path = tree / bug.mutant.file
    text = path.read_text()
    path.write_text(text.replace(bug.mutant.old, bug.mutant.new))
    try:
        spoilt = run(tree, bug.test)
    finally:
        path.write_text(text)
    assert spoilt.returncode == 1, spoilt.stdout
