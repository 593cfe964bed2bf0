"""The admin port's settings: where it may listen, what key it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.errors import ConfigError
from gateway.config import Config, is_loopback, load_config

EXPERT = """
experts:
  one:
    source: {scripted: echo}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}
    context_tokens: 100
"""


def load(folder: Path, gateway: str) -> Config:
    path = folder / "coe.yaml"
    path.write_text(EXPERT + f"gateway: {gateway}\n")
    return load_config(path, {})


def test_beyond_the_loopback_a_key_is_demanded(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "gateway.internal"):
        with pytest.raises(ConfigError, match=r"set gateway\.admin_key") as caught:
            load(tmp_path, f"{{admin_host: '{host}'}}")
        assert caught.value.line == 7
        load(tmp_path, f"{{admin_host: '{host}', admin_key: 'env:KEY'}}")
        load(tmp_path, f"{{admin_host: '{host}', admin_port: 'off'}}")
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        load(tmp_path, f"{{admin_host: '{host}'}}")
        assert is_loopback(host)


def test_a_key_comes_by_name_and_is_not_short(tmp_path: Path) -> None:
    gateway = load(tmp_path, "{admin_key: 'env:KEY'}").gateway
    assert gateway.resolve_admin_key({"KEY": "k" * 16}) == "k" * 16
    for environment in ({}, {"KEY": ""}, {"KEY": "k" * 15}):
        with pytest.raises(ConfigError) as caught:
            gateway.resolve_admin_key(environment)
        assert "kkkk" not in caught.value.message
    assert load(tmp_path, "{}").gateway.resolve_admin_key({}) is None
    with pytest.raises(ConfigError):
        load(tmp_path, "{admin_key: written-out-here}")


@pytest.mark.parametrize(
    ("setting", "port", "admin"),
    [
        ("{}", 8000, 8001),
        ("{}", 0, 0),
        ("{}", 65_535, 0),
        ("{admin_port: 9000}", 8000, 9000),
        ("{admin_port: 0}", 8000, 0),
        ("{admin_port: 'off'}", 8000, None),
    ],
)
def test_the_admin_port_stands_beside_the_gateways(
    tmp_path: Path, setting: str, port: int, admin: int | None
) -> None:
    assert load(tmp_path, setting).gateway.admin_port_beside(port) == admin
