"""``coe simulate`` from the command line to its files."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from deployments.simulate.cluster import shipped_cluster
from deployments.simulate.command import SimulateOptions, simulate
from deployments.simulate.compare import POLICIES
from experts.errors import ConfigError
from gateway.cli import app


def rates(folder: Path, rate_rps: float = 0.5) -> Path:
    """Four clients, two windows; the last client asks nothing."""
    path = folder / "rates.parquet"
    table = {
        "t_s": [0, 600] * 4,
        "rate_rps": [rate_rps, 0.1, 0.2, 0.2, 0.0, 0.3, 0.0, 0.0],
        "cv": [1.0, 2.0, 5.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        "client": [0, 0, 1, 1, 2, 2, 3, 3],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    out, report = tmp_path / "result.json", tmp_path / "report"
    arguments = ["--trace", str(rates(tmp_path)), "--experts", "4", "--minutes", "15"]
    files = ["--json", str(out), "--report", str(report)]
    done = CliRunner().invoke(app, ["simulate", *arguments, "--seed", "3", *files])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert tuple(sorted(result["policies"])) == tuple(sorted(POLICIES))
    for name, figures in result["policies"].items():
        assert figures["served"] + figures["missed"] == result["requests"] == figures["requests"]
        assert f"{figures['goodput']:.4f}" in done.output
        assert name in done.output
    assert (result["seed"], result["experts"], result["active_experts"]) == (3, 4, 3)
    assert result["runtime_s"] >= 0
    page = (report / "simulate.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) == 1 + 5 + len(POLICIES)
    for drawing in drawings:
        xml.dom.minidom.parseString(drawing)
    assert "http" not in page


def test_equal_options_give_an_equal_result(tmp_path: Path) -> None:
    options = SimulateOptions(rates(tmp_path), experts=3, minutes=20, seed=5)
    first, second = (json.dumps(simulate(options), sort_keys=True) for _ in range(2))
    assert first == second


def test_a_cluster_file_can_be_named(tmp_path: Path) -> None:
    shipped = shipped_cluster("h100_node").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(shipped.replace("count: 8", "count: 2"))
    options = SimulateOptions(rates(tmp_path), str(file), experts=3, minutes=10)
    assert simulate(options)["engines"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cluster": "no_such"}, "no such example"),
        ({"rate_scale": 1e5}, "lower --rate-scale"),
        ({"rate_scale": 1e-9}, "no request arrives"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    options = SimulateOptions(rates(tmp_path), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=reason):
        simulate(options)
