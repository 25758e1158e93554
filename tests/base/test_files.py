"""Whole-or-absent files and the state folder."""

import os
import stat
from pathlib import Path

import pytest

from tenon.base import files
from tenon.base.errors import ConfigError, ResourceError


def test_written_bytes_are_read_back_with_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    files.write_bytes(path, b"\x00secret", mode=0o600)
    assert path.read_bytes() == b"\x00secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    files.write_json(path, {"x": 2})
    assert files.read_json(path) == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_refused_value_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path) == {"x": 1}


def test_a_target_that_cannot_be_replaced_is_named(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"cannot write .*folder"):
        files.write_text(path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("content", "said"), [(b"{", "line 1"), (b'"\xff"', "not UTF-8 at byte 1")])
def test_what_is_not_json_is_named_with_its_place(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        files.read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        files.read_json(tmp_path / "nothing.json")


def test_the_state_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENON_STATE", str(tmp_path / "state"))
    os.makedirs(tmp_path / "state", mode=0o755)
    folder = files.state_folder()
    assert folder == tmp_path / "state"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_state_folder_is_under_home_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENON_STATE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.state_folder() == tmp_path / ".local" / "state" / "tenon"


def test_a_state_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENON_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(ResourceError, match="set TENON_STATE"):
        files.state_folder()
