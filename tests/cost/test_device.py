"""The catalogue: every figure has a source, every device its caveats, every error one sentence."""

from pathlib import Path

import pytest

from tenon.base.errors import ConfigError
from tenon.cost.device import CATALOGUE, catalogue, find, read_catalogue
from tenon.cost.work import KINDS

NEEDED = (
    "H200", "H100", "A100-80", "A100-40", "L40S", "L4", "A10G", "A6000", "V100", "T4", "RTX4090", "MI300X", "B200",
)  # fmt: skip


def test_the_devices_that_planning_needs_are_there_with_cpus_beside_them() -> None:
    devices = catalogue().devices
    assert set(NEEDED) <= devices.keys()
    assert sum(device.kind == "cpu" for device in devices.values()) >= 2


@pytest.mark.parametrize("name", catalogue().devices)
def test_every_figure_has_a_source_and_a_date(name: str) -> None:
    device = catalogue().devices[name]
    figures = [*device.flops.values(), device.memory_bytes, device.bandwidth_Bps]
    figures += [figure for link in device.links for figure in (link.rate_Bps, link.latency_s)]
    assert all(figure.value > 0 and figure.source and figure.date for figure in figures)
    assert all(price.on_demand > 0 and price.source and price.date for price in device.prices)
    assert all(price.spot[0] <= price.spot[1] for price in device.prices if price.spot)
    assert device.use.source
    assert device.use.flops.keys() == device.use.bytes.keys() == set(KINDS)


def test_rates_are_dense_and_memory_is_what_can_be_used() -> None:
    assert find("L4").peak("bfloat16") == 121e12  # 242 counts structured sparsity
    assert find("H100").peak("bfloat16") == 989e12
    assert find("L4").memory_bytes.value == 22_888 * 2**20
    assert find("L40S").memory_bytes.value == 45_776 * 2**20


def test_prices_are_per_device() -> None:
    p5 = next(price for price in find("H100").prices if price.sku == "p5.48xlarge")
    assert p5.on_demand == pytest.approx(6.88)
    assert p5.spot == pytest.approx((10.2 / 8, 25.8 / 8))


@pytest.mark.parametrize("name", ["V100", "T4"])
def test_a_device_without_bf16_says_so_and_takes_fp16(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no arithmetic in bfloat16; price the model as float16"):
        find(name).peak("bfloat16")
    assert find(name).peak("float16") > 0


@pytest.mark.parametrize(("asked", "near"), [("H10O", "H100"), ("a100", "A100-80"), ("rtx 4090", "RTX4090")])
def test_an_unknown_device_is_one_sentence_with_the_nearest_names(asked: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no device '{asked}' in the catalogue; did you mean .*{near}"):
        find(asked)


def test_a_name_like_none_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"there are H200, .*, H100, .* and local"):
        find("zzzzzz")


def test_the_case_of_a_name_does_not_matter() -> None:
    assert find("h200") is find("H200")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'bandwidth_Bps = [4.8e12, "llmprof"]',
            'bandwidth_Bps = [4.8e12, "nobody"]',
            "device.H200.bandwidth_Bps.source",
        ),
        (
            'bandwidth_Bps = [4.8e12, "llmprof"]',
            "bandwidth_Bps = 4.8e12",
            "a pair of a number and the key of its source",
        ),
        ('memory_bytes = [141e9, "decimal"]', 'memory_bytes = [-1, "decimal"]', "device.H200.memory_bytes is -1"),
        ("linear = 0.65", "linear = 1.5", "use.gpu.flops.linear is 1.5"),
        ("spot = [15.5, 24.2]", "spot = [24.2, 15.5]", "device.H200.prices.spot"),
        ('kind = "gpu"', 'kind = "tpu"', "device.H200.kind is 'tpu'; it must be one of gpu, cpu"),
        ("[device.H200]", "[device.H200", "is not TOML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = CATALOGUE.read_text()
    assert old in text
    path = tmp_path / "catalogue.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as raised:
        read_catalogue(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_catalogue_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_catalogue(tmp_path / "none.toml")
