"""Every benchmark starts as the documentation says: as a file, from any folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_BENCH = Path(__file__).resolve().parents[2] / "bench"
_COMMANDS = sorted(path for path in _BENCH.glob("[a-z]*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda path: path.name)
def test_a_command_finds_the_project_before_it_imports_from_it(command: Path) -> None:
    """Started as a file, a script's first import path is its own folder, not the project's."""
    statements = ast.parse(command.read_text()).body
    imports = [
        s.lineno
        for s in statements
        if isinstance(s, ast.ImportFrom) and (s.module or "").split(".")[0] == "bench"
    ]
    paths = [
        s.lineno
        for s in statements
        if isinstance(s, ast.Expr) and ast.unparse(s).startswith("sys.path.insert(0,")
    ]
    assert not imports or (paths and min(paths) < min(imports))
