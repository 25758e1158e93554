"""`tenon device`: the catalogue, one device, this machine."""

import argparse
import json
from pathlib import Path

import msgspec
import pytest

from tenon.base.errors import ConfigError
from tenon.cli import device
from tenon.cost import calibration
from tenon.cost.device import catalogue


def tenon_device(*words: str) -> int:
    parser = argparse.ArgumentParser()
    device.add_arguments(parser)
    return device.run(parser.parse_args(words))


def test_the_list_names_every_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert tenon_device() == 0
    said = capsys.readouterr().out
    assert all(name in said for name in catalogue().devices)


def test_one_device_shows_sources_and_dates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert tenon_device("l4") == 0
    said = capsys.readouterr().out
    assert "121 TFLOP/s" in said
    assert "Coral, arXiv 2605.04357v1" in said
    assert "0.80 $/h, spot 0.26-0.45" in said
    assert "structured sparsity" in said


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert tenon_device("H100", "--json") == 0
    one = json.loads(capsys.readouterr().out)
    assert one["flops"]["bfloat16"]["value"] == 989e12
    assert one["flops"]["bfloat16"]["source"]
    assert tenon_device("--json") == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(catalogue().devices)


def test_an_unknown_device_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="there is no device 'H101' in the catalogue; did you mean H100"):
        tenon_device("H101")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["H100", "--calibrate"], "--calibrate is for 'tenon device local'"),
        (["--plot", "x.svg"], "--plot is for 'tenon device local'"),
        (["local", "--threads", "2"], "--threads goes with --calibrate"),
        (["local", "--numerics", "invariant"], "--numerics goes with --calibrate"),
        (["L4", "--numerics", "fast"], "--numerics is for 'tenon device local'"),
        (["local", "--calibrate", "--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tenon_device(*words)


def test_a_machine_that_is_not_calibrated_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENON_STATE", str(tmp_path))
    with pytest.raises(ConfigError, match="this machine is not calibrated; run `tenon device local --calibrate`"):
        tenon_device("local")


def test_a_failing_probe_is_quoted() -> None:
    from rich.console import Console

    from tenon.base.errors import ResourceError

    with pytest.raises(ResourceError, match=r"the probe failed: .*no_such_option"):
        device.probe({"no_such_option": 1}, Console(quiet=True))


@pytest.mark.torch
def test_a_small_calibration_is_kept_shown_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TENON_STATE", str(tmp_path))
    options = {"threads": 1, "device": "cpu", "numerics": "invariant", "scale": 0.02}
    measured = device.probe(options, Console(quiet=True))
    assert measured.numerics == "invariant"
    calibration.save(calibration.calibrate(measured))
    figure = tmp_path / "roof.svg"
    assert tenon_device("local", "--plot", str(figure)) == 0
    said = capsys.readouterr().out
    assert "steps timed" in said
    assert "invariant numerics" in said
    assert "gemv_Bps" in said
    assert figure.read_bytes().startswith(b"<?xml")
    assert tenon_device("local", "--json") == 0
    again = msgspec.convert(json.loads(capsys.readouterr().out), calibration.Calibration)
    assert again == calibration.load()
