"""Starts the whole thing as a user does: ``coe serve`` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from experts.catalogue import cache_dir

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "coe.yaml"
READY_S = 240.0
_ENGINE = re.compile(r"EngineCore|multiprocessing\.spawn")


def write_config(
    folder: Path, *, gateway: Mapping[str, object] | None = None, **sections: object
) -> Path:
    """The quickstart's configuration with some sections replaced, on any free ports.

    A path of its own also marks every process of this run: it is in their environment.
    """
    config = yaml.safe_load(QUICKSTART.read_text())
    config["gateway"] = {"port": 0, "admin_port": 0, **(gateway or {})}
    config.update(sections)
    path = folder / "coe.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@dataclass
class Stack:
    """A running ``coe serve``."""

    process: subprocess.Popen[str]
    config: Path
    log: Path
    url: str

    def processes(self, said: str = "") -> list[psutil.Process]:
        """All live processes of this run, wherever they hang in the tree, with this in the
        command line."""
        return [p for p in psutil.process_iter() if _belongs(p, self.config, said)]

    def replica(self) -> psutil.Process:
        """The Ray Serve replica that holds the engine."""
        (found,) = self.processes("ServeReplica")
        return found

    def engine(self) -> psutil.Process:
        """vLLM's engine process, a child of the replica.

        It names itself through setproctitle, which finds the command line by walking back from
        the first environment variable and gives up silently where that one has been replaced.
        Ray hands variables down in no fixed order, so an engine may keep the name that
        multiprocessing started it under.
        """
        children = {p: " ".join(p.cmdline()) for p in self.replica().children()}
        (found,) = (p for p, command in children.items() if _ENGINE.search(command))
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=120)

    def text(self) -> str:
        return self.log.read_text()


def _belongs(process: psutil.Process, config: Path, said: str) -> bool:
    try:
        command = process.cmdline()
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and said in " ".join(command)
            and (process.environ().get("COE_CONFIG") == str(config) or str(config) in command)
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def launch(config: Path, folder: Path, extra_env: Mapping[str, str] | None = None) -> Stack:
    log = folder / "serve.log"
    own = {"HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(folder / "state")}
    environment = {**os.environ, **own, **(extra_env or {})}
    environment.pop("COE_CONFIG", None)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Stack(process, config, log, "")


def wait_ready(stack: Stack) -> Stack:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        found = re.search(r"^READY\s+(\S+)", stack.text(), re.MULTILINE)
        if found:
            stack.url = found.group(1)
            return stack
        if stack.process.poll() is not None:
            raise AssertionError(f"coe serve ended:\n{stack.text()}")
        time.sleep(0.25)
    stack.stop(signal.SIGKILL)
    raise AssertionError(f"not ready after {READY_S:.0f} s:\n{stack.text()}")


def quickstart_is_prepared() -> bool:
    root = cache_dir(os.environ) / "quickstart"
    return all((root / name / "config.json").is_file() for name in ("general", "sql"))
