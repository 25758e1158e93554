"""Shapes by name: the models whose costs are asked for without a checkpoint, and any folder's ``config.json``.

``shapes.toml`` holds them with their sources. Families that the decoder runs become a ``ModelSpec``, exactly as from a
``config.json``; the others are known by their costs alone and become a ``CostShape``. Both have what planning needs:
``n_parameters``, ``weights_bytes``, ``kv_groups``, ``max_position``, ``cost``, and :func:`tenon.models.spec.step_work`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tenon.base.errors import ConfigError
from tenon.models.hf_config import ARCHITECTURE, parse_config, read_config
from tenon.models.hub import EMBEDDED, resolve
from tenon.models.spec import CostShape, ModelSpec

FILE: Final = Path(__file__).with_name("shapes.toml")
DTYPE: Final = "bfloat16"
"""Of a shape whose table names none: all of these models were published in it or are served in it."""


@cache
def _tables() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """The models of ``shapes.toml``, in its order."""
    return tuple(_tables())


def source(name: str) -> str:
    """Where the shape of model ``name`` is from."""
    return str(_tables()[name]["source"])


def published_parameters(name: str) -> float:
    """How many weights model ``name`` is said to have."""
    return float(_tables()[name]["parameters"]) * 1e9


def find(name: str) -> ModelSpec | CostShape:
    """A name of ``shapes.toml`` in any case, "embedded", or a folder with a ``config.json``; nothing is fetched.

    Raises ``ConfigError`` with the nearest names for what is none of these, and as ``read_config`` does for a folder
    whose model is unknown or damaged.
    """
    known = {one.casefold(): one for one in names()}
    if name.casefold() in known:
        return load(known[name.casefold()])
    if name in EMBEDDED or Path(name).expanduser().is_dir():
        return read_config(resolve(name))
    near = [known[one] for one in difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    raise ConfigError(f"there is neither a folder nor a known shape {name!r}; {hint}", subject=name)


@cache
def load(name: str) -> ModelSpec | CostShape:
    """The shape that ``shapes.toml`` calls exactly ``name``."""
    table = _tables()[name]
    if "config" not in table:
        return _cost_shape(name, table["cost"])
    config = dict(table["config"])
    config |= {"architectures": [ARCHITECTURE[config["model_type"]]], "torch_dtype": config.get("torch_dtype", DTYPE)}
    return parse_config(config, f"{FILE.name}: {name}")


def _cost_shape(name: str, table: Mapping[str, Any]) -> CostShape:
    given = dict(table)
    attention, windows = given.pop("attention"), given.pop("windows", [])
    d, n_layers = given["hidden_size"], given["n_layers"]
    if "heads" in attention:
        q, kv = attention["heads"] * attention["head_dim"], attention["kv_heads"] * attention["head_dim"]
        parts = {
            "attention_weights": d * (q + 2 * kv) + q * d,
            "attention_width": q + 2 * kv,
            "pair_flops": 4 * q,
            "kv_elements": 2 * kv,
            "kv_heads": attention["kv_heads"],
        }
    else:
        parts = {
            "attention_weights": attention["weights"],
            "attention_width": attention["width"],
            "pair_flops": attention["pair_flops"],
            "kv_elements": attention["kv_elements"],
            "kv_heads": attention["kv_heads"],
        }
    # A list shorter than the model repeats; 0 stands for a layer that sees everything.
    per_layer = tuple(windows[i % len(windows)] or None for i in range(n_layers)) if windows else ()
    return CostShape(name=name, windows=per_layer, dtype=given.pop("dtype", DTYPE), **given, **parts)
