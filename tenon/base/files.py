"""Files that are either whole or absent, and the folder where Tenon keeps its state.

A write goes to a temporary file beside its target, is flushed to disk, and takes the target's name in one rename:
a reader, or a machine that loses power, sees the old content or the new, never a part.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tenon.base.errors import ConfigError, ResourceError


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` with permission bits ``mode``; its folder is made if need be.

    Raises ``ResourceError`` when the disk refuses; the old content is then untouched.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode(), mode=mode)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """``write_bytes`` of indented JSON in the given key order, ended by a newline; NaN is refused (``ValueError``)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def read_json(path: Path) -> Any:
    """The JSON value in ``path``. Raises ``ConfigError`` naming the file, and the line where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", subject=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", subject=str(path)) from error


def state_folder() -> Path:
    """Where keys and caches of this user live: ``$TENON_STATE``, else ``~/.local/state/tenon``.

    Made with mode 0700; a folder that others can read is narrowed to it. Raises ``ResourceError`` when it cannot be
    made or belongs to somebody else.
    """
    given = os.environ.get("TENON_STATE")
    try:
        folder = Path(given) if given else Path.home() / ".local" / "state" / "tenon"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:
        where = given or "~/.local/state/tenon"
        raise ResourceError(
            f"cannot make the state folder {where} with mode 0700 ({error}); set TENON_STATE to a folder of yours",
            subject="TENON_STATE",
        ) from error
    return folder


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
