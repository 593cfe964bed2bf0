"""Check cpu.lock for known vulnerabilities with pip-audit; never claim more than was checked.

    python requirements/audit.py [--advisory]

Exit status: 0 nothing found, 1 something found, 3 not done (with --advisory 0, in the same words).
A source of advisories may be out of reach, or answer and know nothing, as partial mirrors do. So a
version with well-known advisories is asked for first: only a source that reports those is believed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOOL = "audit.lock"  # pip-audit, and everything that it needs
KNOWN_BAD = "jinja2==2.10"  # CVE-2019-10906 and later ones
ENVIRONMENT = HERE.parent / ".venv-audit"
TIMEOUT_S = 600
NOT_DONE = 3


def main(arguments: list[str]) -> int:
    status, text = audited()
    print(f"audit: {text}")
    return 0 if status == NOT_DONE and "--advisory" in arguments else status


def audited() -> tuple[int, str]:
    """The exit status and one sentence."""
    tool = _tool()
    if tool is None:
        return NOT_DONE, f"NOT DONE: {TOOL} cannot be installed here."
    probe = _asked(tool, [KNOWN_BAD])
    if probe is None or not _findings(probe):
        return NOT_DONE, (
            f"NOT DONE: the source of advisories does not answer, or knows nothing of {KNOWN_BAD}, "
            "which has several. Nothing is known about the locked packages."
        )
    locked = _locked()
    answer = _asked(tool, locked)
    if answer is None:
        return NOT_DONE, "NOT DONE: the source of advisories stopped answering."
    accepted = _accepted()
    found = [line for line in _findings(answer) if line.split()[1] not in accepted]
    skipped = [p["name"] for p in answer["dependencies"] if "skip_reason" in p]
    told = f"{len(locked) - len(skipped)} of {len(locked)} packages checked"
    if skipped:
        told += f", not known to the source: {', '.join(sorted(skipped))}"
    if found:
        return 1, "\n  ".join([f"{len(found)} known vulnerabilities ({told}):", *found])
    return 0, f"no known vulnerability; {told}."


def _tool() -> Path | None:
    """pip-audit in an environment of its own: a checker should not live in what it checks."""
    tool, made_from = ENVIRONMENT / "bin" / "pip-audit", ENVIRONMENT / TOOL
    pins = (HERE / TOOL).read_text()
    if tool.exists() and made_from.exists() and made_from.read_text() == pins:
        return tool
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
    pip += ["--no-deps", "-r", str(HERE / TOOL)]
    done = subprocess.run(pip, capture_output=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0 or not tool.exists():
        return None
    made_from.write_text(pins)
    return tool


def _asked(tool: Path, requirements: list[str]) -> dict[str, Any] | None:
    """pip-audit's report; None when it could not make one."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        command = [str(tool), "-r", file.name, "--no-deps", "--disable-pip", "-f", "json"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None
    return report


def _findings(report: dict[str, Any]) -> list[str]:
    return [
        f"{package['name']}=={package['version']} {one['id']} "
        f"(fixed in {', '.join(one['fix_versions']) or 'no version yet'})"
        for package in report["dependencies"]
        for one in package.get("vulns", ())
    ]


def _locked() -> list[str]:
    """The pins; a local version part (``+cpu``) names the same source code."""
    lines = (HERE / "cpu.lock").read_text().splitlines()
    return [line.strip().partition("+")[0] for line in lines if "==" in line and line[0] != "#"]


def _accepted() -> frozenset[str]:
    """Ids of advisories that stand in audit-accepted.txt, one a line before its reason."""
    lines = (HERE / "audit-accepted.txt").read_text().splitlines()
    return frozenset(line.split()[0] for line in lines if line.strip() and line[0] != "#")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
