"""The rules of the house: what loads torch, what the map says, what is never written."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tenon"
MAX_LINES = 500

# Modules that need torch (a trailing dot: everything below). All others are held to load without it.
HEAVY = (
    "tenon.llm",
    "tenon.compiler",
    "tenon.engine.executors",
    "tenon.models",
    "tenon.training",
    "tenon.bench.limits",
)
# Exceptions from HEAVY: torch-free again.
LIGHT = (
    "tenon.engine.executors.base",
    "tenon.engine.executors.hash",
    "tenon.engine.executors.simulated",
    "tenon.models.spec",
    "tenon.models.shapes",
    "tenon.models.hf_config",
    "tenon.models.metadata",
    "tenon.models.tokenizer",
    "tenon.models.template",
    "tenon.models.template_worker",
    "tenon.models.generation",
    "tenon.models.embedding",
    "tenon.models.hub",
    "tenon.training.corpus",
    "tenon.training.tokenizer",
)
HEAVY_PACKAGES = ("torch", "transformers", "matplotlib")

# multiprocessing pickles whatever its queues and pipes carry.
BANNED_IMPORTS = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing", "yaml",
}  # fmt: skip
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("torch", "hub"), ("torch", "package"), ("os", "system")}
BANNED_METHODS = {"recv_pyobj", "send_pyobj"}
CLOCK = PACKAGE / "base" / "clock.py"


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def torch_free_modules() -> list[str]:
    names = [module_name(path) for path in sources() if path.name != "__main__.py"]
    # A package's own __init__ imports nothing, so it is held to be light even where its modules are heavy.
    packages = {module_name(path) for path in sources() if path.name == "__init__.py"}
    return [name for name in names if name in packages or not within(name, HEAVY) or within(name, LIGHT)]


def loaded_after(*modules: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after importing ``modules``, each named with its culprit."""
    program = f"""
import importlib, sys
heavy, seen = {HEAVY_PACKAGES!r}, set()
for name in {modules!r}:
    importlib.import_module(name)
    for package in heavy:
        if package in sys.modules and package not in seen:
            seen.add(package)
            print(name, "loads", package)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_marked_torch_free_loads_without_torch() -> None:
    assert loaded_after(*torch_free_modules()) == []


def test_the_torch_free_test_sees_torch() -> None:
    assert "tenon.bench.limits loads torch" in loaded_after("tenon.bench.limits")


def test_importing_tenon_loads_none_of_its_packages_nor_numpy() -> None:
    program = "import tenon, sys; print([m for m in sys.modules if m.startswith('tenon.') or m == 'numpy'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_sampling_params_are_loaded_when_asked_for() -> None:
    import tenon

    assert tenon.SamplingParams(max_tokens=3).max_tokens == 3
    assert "LLM" in dir(tenon)
    with pytest.raises(AttributeError, match="nothing"):
        _ = tenon.nothing


@pytest.mark.parametrize("path", [p for p in sources() if p.name == "__init__.py"], ids=module_name)
def test_a_package_file_imports_nothing_eagerly(path: Path) -> None:
    allowed = {"__future__", "importlib", "typing"}
    tree = ast.parse(path.read_text())
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in eager}
    assert names <= allowed


def folders() -> set[str]:
    """Every folder of the package that holds something, relative to the repository."""
    found = set()
    for folder, names, files in os.walk(PACKAGE):
        names[:] = [name for name in names if name != "__pycache__" and not name.startswith(".")]
        if folder != str(PACKAGE) and (names or files):
            found.add(Path(folder).relative_to(ROOT).as_posix())
    return found


def test_the_map_names_every_folder_and_no_other() -> None:
    rows = re.findall(r"^\| `(tenon/[^`]*)` \| (.*?) \|", (ROOT / "docs" / "map.md").read_text(), re.MULTILINE)
    mapped = [folder for folder, _ in rows]
    assert sorted(mapped) == sorted(set(mapped))
    assert set(mapped) == folders()
    assert all(line.strip() for _, line in rows)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_nothing_unsafe_or_banned_is_written(path: Path) -> None:
    assert violations(path) == []


def violations(path: Path) -> list[str]:
    """Each use of what the house bans, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    found += imported(node.lineno, alias.name, path)
            case ast.ImportFrom(module=str(module)):
                found += imported(node.lineno, module, path)
                found += [
                    f"{node.lineno}: {module}.{a.name}" for a in node.names if (module, a.name) in BANNED_ATTRIBUTES
                ]
            case ast.Call(func=ast.Name(id=name)) if name in BANNED_CALLS:
                found.append(f"{node.lineno}: {name}()")
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in BANNED_ATTRIBUTES:
                found.append(f"{node.lineno}: {owner}.{name}")
            case ast.Attribute(attr=name) if name in BANNED_METHODS:
                found.append(f"{node.lineno}: {name}")
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                found.append(f"{node.value.lineno}: allow_pickle")
            case ast.Assert():
                found.append(f"{node.lineno}: assert")
    return found


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def imported(line: int, module: str, path: Path) -> list[str]:
    root = module.split(".")[0]
    banned = root in BANNED_IMPORTS or (root == "time" and path != CLOCK)
    return [f"{line}: import {module}"] if banned else []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import pickle", "1: import pickle"),
        ("from marshal import loads", "1: import marshal"),
        ("import time", "1: import time"),
        ("import torch\ntorch.load('x')", "2: torch.load"),
        ("from torch import load", "1: torch.load"),
        ("np.load('x', allow_pickle=True)", "1: allow_pickle"),
        ("from multiprocessing import Queue", "1: import multiprocessing"),
        ("socket.recv_pyobj()", "1: recv_pyobj"),
        ("import torch\ntorch.hub.load('x', 'y')", "2: torch.hub"),
        ("eval('1')", "1: eval()"),
        ("assert True", "1: assert"),
    ],
)
def test_the_ban_sees_what_it_bans(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "x.py").write_text(code)
    assert violations(tmp_path / "x.py") == [said]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_files_open_with_what_they_are_for_and_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < MAX_LINES
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text))


def test_tests_mirror_the_package() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert tested <= packages


def test_texts_speak_of_the_project_alone() -> None:
    """No path of one person's machine in code or documentation."""
    private = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+|opt)/")
    texts = [*sources(), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.py"), ROOT / "Makefile"]
    assert [str(path.relative_to(ROOT)) for path in texts if private.search(path.read_text())] == []
