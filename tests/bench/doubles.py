"""Contenders with known behaviour, run in real processes."""

import os
from typing import Any

from tenon.base import clock


class Known:
    """Yields ``base_s * factor`` where ``base_s`` comes from the cell, growing a little each sample."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor
        self._n = 0

    def setup(self, cell: dict[str, Any]) -> None:
        self._base_s = float(cell.get("base_s", 1.0))
        print("this line is no answer")

    def sample(self) -> dict[str, float]:
        self._n += 1
        return {"seconds": self._base_s * self._factor * (1 + 0.01 * self._n)}

    def close(self) -> None:
        self._n = 0


class Environment(Known):
    """Tells its process and its threads."""

    def sample(self) -> dict[str, float]:
        return {"pid": float(os.getpid()), "threads": float(os.environ["OMP_NUM_THREADS"])}


class Failing(Known):
    """Goes wrong at its second sample, in the way it was told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def sample(self) -> dict[str, float]:
        if self._n == 1:
            if self._how == "raise":
                raise RuntimeError("it broke")
            if self._how == "exit":
                os._exit(3)
            if self._how == "hang":
                clock.sleep_s(60)
            if self._how == "words":
                return {"seconds": "many"}
            if self._how == "rename":
                return {"minutes": 1.0}
        return super().sample()


class Unequal(Known):
    """Two copies of it differ: the second to be set up finds the first one's file and is slower."""

    def setup(self, cell: dict[str, Any]) -> None:
        super().setup(cell)
        try:
            with open(cell["file"], "x"):
                self._factor = 1.0
        except FileExistsError:
            self._factor = 1.2
