"""From what a user calls a model to the folder that holds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tenon.base.errors import CheckpointError, ConfigError, ResourceError

EMBEDDED: Final = {"embedded": "target", "embedded-draft": "draft"}
"""The pair that ships inside the package."""

WANTED: Final = ("*.json", "*.safetensors", "*.jinja")
"""What is fetched from a hub: data alone, no code and no pickles."""
NESTED: Final = ("[!0-9]*/*", "[0-9][!_]*/*", "*/*.safetensors")
"""Folders inside a repository hold other formats of the same weights; but ``1_Pooling`` says how to embed."""

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def resolve(name: str, *, revision: str | None = None) -> Path:
    """The folder of model ``name``: ``embedded``, ``embedded-draft``, a folder, or a hub name (``Qwen/Qwen3-0.6B``).

    A folder wins over a hub name. Hub names need the extra ``tenon[hub]`` and, unless cached, the network. Raises
    ``ConfigError`` for what is none of these or a missing extra, ``CheckpointError`` for a folder without a model or a
    name that the hub does not know, ``ResourceError`` when the hub cannot be reached.
    """
    if name in EMBEDDED:
        return _folder(Path(__file__).parent / "embedded" / EMBEDDED[name], name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _folder(path, name)
    if name and path.exists():
        raise ConfigError(f"{name} is a file; a model is the folder around it", subject=name)
    if name.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"there is no folder {name!r}, and it is no hub name either; give a folder, a name such as "
            f"'Qwen/Qwen3-0.6B', or 'embedded'",
            subject=name,
        )
    return _folder(_download(name, revision), name)


def _folder(path: Path, name: str) -> Path:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model {name!r}: {path} has no config.json", subject=name)
    return path


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError(
            f"there is no folder {name!r}, and fetching it by name needs huggingface_hub: pip install 'tenon[hub]'",
            subject=name,
        ) from error
    try:
        return Path(
            hub.snapshot_download(
                name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(NESTED), library_name="tenon"
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(f"the hub gives {name!r} only to those who accepted its terms", subject=name) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"there is no folder {name!r}, and the hub knows no model of that name{at}", subject=name
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            f"cannot fetch {name!r} from the hub, and it is not in the local cache ({type(error).__name__}); give a "
            f"folder, or try again with a network",
            subject=name,
        ) from error
