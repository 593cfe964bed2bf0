"""Engine processes do not outlive a killed owner: with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAF = """
import sys, time
from experts.owner_watch import watch_owner
watch_owner(int(sys.argv[1]), every_s=0.02)
print("watching", flush=True)
time.sleep(60)
"""
MIDDLE = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]])
"""
OWNER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
"""


def test_whoever_stands_between_a_killed_owner_and_its_worker_ends_too() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, MIDDLE, LEAF], cwd=ROOT, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"watching\n"
        below = psutil.Process(owner.pid).children(recursive=True)
        assert len(below) == 2
        owner.kill()
        owner.wait()
        _, alive = psutil.wait_procs(below, timeout=10)
        for process in alive:
            process.kill()
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("owner", ["itself", "a stranger"])
def test_a_process_that_is_not_below_the_owner_is_left_alone(owner: str) -> None:
    code = LEAF.replace("time.sleep(60)", "time.sleep(0.2)").replace("int(sys.argv[1])", "who")
    who = "import os; who = os.getpid()" if owner == "itself" else "who = 2**22 + 1"
    ran = subprocess.run([sys.executable, "-c", f"{who}\n{code}"], cwd=ROOT, check=False)
    assert ran.returncode == 0
