"""The tables in docs/experiments.md list the experiments that are tested, all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| .+ \| .+ \| `(\w+\.py::\w+)` \| .+ \|")


def test_the_tables_equal_the_tests() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| experiment |")]
    written = [match[1] for match in map(ROW.fullmatch, rows) if match]
    tests = [
        f"{path.name}::{node.name}"
        for path in (ROOT / "tests" / "experiments").glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(written) == len(rows) >= 40
    assert sorted(written) == sorted(tests)
