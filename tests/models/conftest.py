from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import zoo


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a zoo checkpoint in fp32, made once a session."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = zoo.checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder
