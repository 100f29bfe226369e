"""The README's session runs as it stands: as a script, from standard input, in a notebook, and in a pytest file elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def session() -> str:
    match = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return match[1]


def run(*arguments: str | Path, folder: Path, text: str | None = None) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, input=text, capture_output=True, text=True, timeout=110, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_session_has_eight_lines_and_no_main_guard(session: str) -> None:
    assert len([line for line in session.splitlines() if line]) == 8
    assert "__main__" not in session


def test_as_a_script(session: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(session)
    assert "Once upon a time" in run("script.py", folder=tmp_path)


def test_from_standard_input(session: str, tmp_path: Path) -> None:
    assert "Once upon a time" in run("-", folder=tmp_path, text=session)


def test_in_a_notebook(session: str, tmp_path: Path, jupyter_event_loop: None) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(session)])
    nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "Once upon a time" in printed


def test_in_a_pytest_file_elsewhere(session: str, tmp_path: Path) -> None:
    (tmp_path / "test_session.py").write_text("def test_session():\n" + textwrap.indent(session, "    "))
    assert "1 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_session.py", folder=tmp_path)
