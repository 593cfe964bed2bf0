"""The walk-through's extra expert: its three files fit the quickstart's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from gateway.config import load_config
from policies.loader import load_policy
from routers.dataset import read_prompts

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
MORE = QUICKSTART / "one_more"


def test_it_is_the_quickstart_and_one_expert() -> None:
    own, shipped = (yaml.safe_load((f / "coe.yaml").read_text()) for f in (MORE, QUICKSTART))
    assert own["experts"].pop("chat")["price"]["input_usd_per_mtok"] < 0.02
    assert own["experts"] == shipped["experts"]
    (host,), (before,) = own["hosts"], shipped["hosts"]
    assert host == {**before, "experts": [*before["experts"], "chat"]}
    assert load_config(MORE / "coe.yaml", {"COE_CACHE_DIR": "/c"}).catalogue.ids[-1] == "chat"


def test_its_policy_adds_one_line_to_the_map() -> None:
    ids = load_config(MORE / "coe.yaml", {"COE_CACHE_DIR": "/c"}).catalogue.ids
    own = load_policy(MORE / "policies" / "auto.yaml", ids)
    shipped = load_policy(ROOT / "policies" / "auto.yaml", None)
    assert own.routes.keys() - shipped.routes.keys() == {"smalltalk"}
    assert replace(own, routes=shipped.routes, digest=shipped.digest) == replace(
        shipped, description=own.description
    )


def test_its_prompts_go_with_the_routers() -> None:
    known = read_prompts(ROOT / "routers" / "data" / "quickstart" / "prompts.jsonl")
    rows = [json.loads(line) for line in (MORE / "smalltalk.jsonl").read_text().splitlines()]
    assert {row["category"] for row in rows} == {"smalltalk"}
    assert len({row["prompt"] for row in rows} - set(known.texts)) == len(rows) >= 50
