"""What the store client makes of its URL, above all that no secret leaves it."""

from __future__ import annotations

import pytest

from deployments.store import StateStore
from experts.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:s3cret@h:7/2", "redis://h:7/2"),
        ("rediss://:s3cret@h", "rediss://h:6379"),
        ("redis://h:7/0?password=s3cret", "redis://h:7/0"),
        ("unix:///run/v.sock?password=s3cret", "unix:///run/v.sock"),
    ],
)
def test_address_is_shown_without_credentials(url: str, shown: str) -> None:
    assert repr(StateStore(url)) == f"StateStore({shown}, available=True)"


@pytest.mark.parametrize(
    "url", ["redis://:half/s3cret@h:1", "redis://u:s3c:ret@h:s3cret", "http://h"]
)
def test_unreadable_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        StateStore(url)
    assert "redis_url" in refusal.value.message
    assert "s3c" not in refusal.value.message
    assert refusal.value.__cause__ is None


def test_keys_stand_in_the_namespace() -> None:
    assert StateStore("redis://h").key("budget", "{k}", "totals") == "coe:budget:{k}:totals"
    assert StateStore("redis://h", namespace="two").key("x") == "two:x"


def test_two_scripts_cannot_share_a_name() -> None:
    store = StateStore("redis://h")
    store.add_script("s", "return 1")
    store.add_script("s", "return 1")
    with pytest.raises(ValueError, match="'s'"):
        store.add_script("s", "return 2")
