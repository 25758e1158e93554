"""Tenon: serve, compile and train open-weight language models.

``LLM`` and ``SamplingParams`` are loaded when they are first asked for, so that ``import tenon`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenon.engine.params import SamplingParams as SamplingParams
    from tenon.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_LAZY = {"LLM": "tenon.llm", "SamplingParams": "tenon.engine.params"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
