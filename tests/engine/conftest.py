from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.build import Lab


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small only wait for a second thread, for minutes where its core is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lab]:
    """``lab(name, dtype, head_dim, numerics)``: made once a session."""
    made: dict[tuple[object, ...], Lab] = {}
    folders: dict[tuple[object, ...], Path] = {}

    def get(name: str, dtype: str = "fp32", head_dim: int | None = 32, numerics: str = "fast") -> Lab:
        key = name, dtype, head_dim
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"{name}-{dtype}")
        if (*key, numerics) not in made:
            made[*key, numerics] = Lab(name, dtype, folders[key], head_dim, numerics)
        return made[*key, numerics]

    return get
