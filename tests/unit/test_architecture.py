"""The tree in docs/architecture.md equals the package, both ways."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lingualinked"

INDENT = 4
ENTRY = re.compile(r"(?P<blanks> *)(?P<name>[\w.]+/?)(?: {2,}(?P<comment>\S.*))?")


def written_tree(page: str) -> dict[str, str]:
    """Read the fenced block that begins with ``src/lingualinked/``.

    One entry a line, indented by four blanks per level; a folder ends in ``/``; two blanks or more before the comment.

    Returns
    -------
    dict of str to str
        Comment of each path (``"model/"``, ``"model/stages/stage.py"``) below the package.
    """
    blocks = re.findall(r"^```\w*\nsrc/lingualinked/\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "docs/architecture.md has one fenced block whose first line is src/lingualinked/"
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in blocks[0].splitlines():
        match = ENTRY.fullmatch(line)
        assert match is not None, f"{line!r} is no entry of the tree"
        depth, rest = divmod(len(match["blanks"]), INDENT)
        assert rest == 0, f"{line!r} is not indented by a multiple of {INDENT}"
        assert 1 <= depth <= len(folders) + 1, f"{line!r} is in no folder"
        del folders[depth - 1 :]
        path = "".join(folders) + match["name"]
        assert path not in entries, f"{path} stands there twice"
        assert match["comment"], f"{path} has no comment"
        entries[path] = match["comment"]
        if path.endswith("/"):
            folders.append(match["name"])
    return entries


def real_tree(package: Path) -> dict[str, str]:
    """Return each folder and Python file below `package` with the first line of its docstring.

    A room's ``__init__.py`` is the room, and the files of a folder of data are its folder.
    """
    entries: dict[str, str] = {}
    for path in sorted(package.rglob("*")):
        relative = path.relative_to(package)
        if "__pycache__" in relative.parts:
            continue
        if path.is_dir() and any(path.iterdir()):
            entries[f"{relative.as_posix()}/"] = headline(path / "__init__.py")
        elif path.suffix == ".py" and (path.name != "__init__.py" or path.parent == package):
            entries[relative.as_posix()] = headline(path)
    return entries


def headline(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    return (docstring or "").partition("\n")[0]


def test_the_tree_equals_the_package() -> None:
    written = written_tree((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    real = real_tree(PACKAGE)
    missing = [f"add     {path}  {real[path]}" for path in real if path not in written]
    extra = [f"remove  {path}" for path in written if path not in real]
    assert not missing + extra, "\n".join(
        ["the tree in docs/architecture.md differs from the package:", *missing, *extra]
    )


def definitions(path: Path) -> set[str]:
    """Return the names of a module's classes and functions, methods with their class before them."""
    found, waiting = set[str](), [("", ast.parse(path.read_text(encoding="utf-8")))]
    while waiting:
        prefix, node = waiting.pop()
        for child in getattr(node, "body", ()):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + child.name)
                waiting.append((f"{prefix}{child.name}.", child))  # type: ignore[arg-type]
    return found


def test_every_file_and_function_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?:::([\w.]+))?`", page)
    assert len(named) > 40
    wrong = []
    for path, function in named:
        base = ROOT if path.startswith("tests/") else PACKAGE
        if not (base / path).is_file() or (function and function not in definitions(base / path)):
            wrong.append(f"{path}::{function}" if function else path)
    assert wrong == []


def test_every_module_says_what_it_does() -> None:
    silent = [path for path, text in real_tree(PACKAGE).items() if not text]
    assert silent == []


def fenced(*lines: str) -> str:
    return "\n".join(["# Title", "```text", "src/lingualinked/", *lines, "```", "more"])


def test_tree_is_read_with_its_folders() -> None:
    text = fenced("    a/       first", "        b.py  second", "        c/   room", "    d.py   third")
    assert written_tree(text) == {"a/": "first", "a/b.py": "second", "a/c/": "room", "d.py": "third"}


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["    a.py"], "no comment"),
        (["    a.py  x", "    a.py  y"], "twice"),
        (["   a.py  x"], "multiple"),
        (["        a.py  x"], "no folder"),
        (["    a.py  x", "        b.py  y"], "no folder"),
        (["    a py"], "no entry"),
    ],
)
def test_a_tree_that_is_badly_written_is_refused(lines: list[str], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        written_tree(fenced(*lines))


def test_a_package_on_disk_is_read(tmp_path: Path) -> None:
    (tmp_path / "room" / "__pycache__").mkdir(parents=True)
    (tmp_path / "room" / "__init__.py").write_text('"""A room."""', encoding="utf-8")
    (tmp_path / "room" / "noun.py").write_text('"""A noun.\n\nMore."""', encoding="utf-8")
    (tmp_path / "room" / "weights.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "__init__.py").touch()
    assert real_tree(tmp_path) == {"__init__.py": "", "room/": "A room.", "room/noun.py": "A noun."}
