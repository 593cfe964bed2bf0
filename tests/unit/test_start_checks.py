"""What ``coe serve`` finds out before it starts anything."""

from __future__ import annotations

import io
import socket
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gateway.config import load_config
from gateway.progress import Progress
from gateway.start_checks import check_memory, check_models, listen
from gateway.start_failed import StartFailed
from gateway.start_report import dialable

CONFIG = """
experts:
  a:
    source: {{path: "{folder}/a"}}
    price: {{input_usd_per_mtok: 0, output_usd_per_mtok: 0}}
    context_tokens: 128
  b:
    source: {{path: "{folder}/b"}}
    price: {{input_usd_per_mtok: 0, output_usd_per_mtok: 0}}
    context_tokens: 128
hosts:
  - {{name: local, experts: [a, b]}}
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "coe.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def make_model(folder: Path, size_bytes: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size_bytes)


def test_a_port_in_use_is_named_with_the_remedy(config_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with taken, ExitStack() as stack, pytest.raises(StartFailed, match=f"port {port}.*--port"):
        stack.enter_context(listen(load_config(config_path), None, port))


def test_a_free_port_is_taken_at_once(config_path: Path) -> None:
    with listen(load_config(config_path), None, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port)).close()


def test_too_little_memory_says_how_much(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "a", 2 << 30)
    config = load_config(config_path)
    free = psutil.virtual_memory()._replace(available=9 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    # 3 GiB of programs; 2 GiB in the pool, in the engine and being read; 0.5 GiB of KV cache
    with pytest.raises(StartFailed, match=r"about 9\.5 GiB are needed, 9\.0 GiB are free"):
        check_memory(config)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=10 << 30))
    check_memory(config)


def test_models_that_are_missing_are_named_and_only_all_of_them_stop_the_start(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(config_path)
    with pytest.raises(StartFailed, match="make models"):
        check_models(config)
    make_model(tmp_path / "a", 10)
    capsys.readouterr()
    check_models(config)
    said = capsys.readouterr().err
    assert "'b'" in said
    assert "'a'" not in said


def test_progress_numbers_its_steps_and_tells_the_time() -> None:
    out, now = io.StringIO(), [0.0]
    progress = Progress(2, out=out, clock=lambda: now[0])
    with progress.step("first") as note:
        now[0] = 1.5
        note("half way")
    with progress.step("second"):
        now[0] = 4.0
    assert out.getvalue().splitlines() == [
        "   0.0 s  [1/2] first",
        "   1.5 s        half way",
        "   1.5 s        done in 1.5 s",
        "   1.5 s  [2/2] second",
        "   4.0 s        done in 2.5 s",
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("gateway.internal", "gateway.internal"),
    ],
)
def test_every_address_to_listen_on_has_a_url(host: str, url: str) -> None:
    assert dialable(host) == url
