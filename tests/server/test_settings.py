"""The config file: what it may name, and that a wrong one is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tenon.base.errors import ConfigError
from tenon.server.limits import Limits
from tenon.server.settings import ADJUSTABLE, Settings, changes, read_settings

BASE = Settings(Limits(max_wait_s=7.0), 30.0)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_a_file_names_what_differs_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "max_in_flight = 64\ndrain_s = 5\nmax_wait_s = inf\n")
    found = read_settings(path, BASE)
    assert found == Settings(replace(BASE.limits, max_in_flight=64, max_wait_s=math.inf), 5)
    assert changes(BASE, found) == {
        "drain_s": {"from": 30.0, "to": 5},
        "max_in_flight": {"from": 512, "to": 64},
        "max_wait_s": {"from": 7.0, "to": math.inf},
    }
    assert read_settings(written(tmp_path, ""), BASE) == BASE


def test_every_adjustable_field_is_one() -> None:
    for name in ADJUSTABLE:
        assert name == "drain_s" or hasattr(BASE.limits, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_in_flight = 0", "max_in_flight must be a whole number of at least 1 and at most .*, got 0"),
        ("max_in_flight = 1.5", "max_in_flight must be a whole number"),
        ("max_in_flight = true", "max_in_flight must be a whole number"),
        (f"body_bytes = {10**30}", "body_bytes must be a whole number"),
        ("max_wait_s = 0", "max_wait_s must be a number of at least 0.001, got 0"),
        ("max_wait_s = nan", "max_wait_s must be a number"),
        ("receipt_s = inf", "receipt_s must be a number of at least 0.001 and at most"),
        ("drain_s = -1", "drain_s must be a number of at least 0"),
        ('drain_s = "5"', "drain_s must be a number of at least 0 and at most .*, got '5'"),
        ("replays = -1", "replays must be a whole number of at least 0"),
        ("max_work = 5", "'max_work' needs a restart"),
        ("max_sequences = 5", "'max_sequences' needs a restart"),
        ('dtype = "float32"', "'dtype' needs a restart"),
        ("port = 8001", "'port' needs a restart and is not set here; what can be set is drain_s, max_in_flight"),
        ("maxinflight = 5", "'maxinflight' is not known; what can be set is"),
        ("[limits]\nreplays = 5", "'limits' needs a restart"),
        ("drain_s 5", "is not TOML"),
        ("x = " + "[" * 50_000, "is not TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_settings(path, BASE, {"port", "limits"})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings(tmp_path / "bytes.toml", BASE)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "none.toml", BASE)
