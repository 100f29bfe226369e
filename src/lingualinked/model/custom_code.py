"""Code that lies beside a checkpoint: found by its config's `auto_map`, and imported where both sides allow it.

Knows folders and Python's import system; neither messages nor what the classes do. Code is never sent: a worker reads its own copy
of the files, and runs exactly those bytes whose digests the caller states.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingualinked.errors import CheckpointError, UnsupportedOperationError
from lingualinked.model.spec import CodeFile, CustomCode

_MAX_FILES = 64  # of code beside a checkpoint
_MAX_DEPTH = 6  # below a folder of models
PACKAGE = "lingualinked_custom_code_"
"""Beginning of the names of the packages that such code is imported as."""

_NOT_ALLOWED = (
    "custom code is not run here: the daemon of this device does not allow it; start it with `lingualinked worker --trust-remote-code "
    "--models FOLDER`, where FOLDER has a copy of the checkpoint's code"
)

_roots: Sequence[Path] | None = None  # None: code is read from the folder that the caller names


def restrict_to(folders: Sequence[Path]) -> None:
    """Let this process run custom code of copies in these folders alone, or none if there is no folder."""
    global _roots  # noqa: PLW0603 - what a process may do holds for all of it
    _roots = tuple(folders)


def find_code(
    folder: Path,
    auto_map: Mapping[str, Any],
    model_class: str,
    fetch: Callable[[str], object] = lambda _module: None,
) -> CustomCode:
    """Describe the code of a checkpoint's folder, without running it.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    auto_map : mapping of str to str
        As in its config.json.
    model_class : str
        Name of the auto class whose class is looked for: ``"AutoModelForCausalLM"``.
    fetch : callable
        Called with the name of each module before it is read, to bring its file into the folder.

    Raises
    ------
    CheckpointError
        If the classes are not in a file of the folder, or a file can't be read.
    """
    references = {name: auto_map.get(name) or "" for name in (model_class, "AutoConfig")}
    for name, reference in references.items():
        parts = reference.split(".") if isinstance(reference, str) else []
        if reference and not (len(parts) == 2 and all(part.isidentifier() for part in parts)):
            raise CheckpointError(
                f"auto_map[{name!r}]={reference!r} of {folder}/config.json does not name a class in a file of the folder (FILE.CLASS): "
                "copy the code into it"
            )
    files: dict[str, CodeFile] = {}
    waiting = [reference.partition(".")[0] for reference in references.values() if reference]
    while waiting:
        module = waiting.pop()
        if module not in files:
            fetch(module)
            source = _read(folder, module)
            files[module] = CodeFile(module=module, digest=_digest(source))
            waiting += _imported(source, folder / f"{module}.py")
            if len(files) > _MAX_FILES:
                raise CheckpointError(f"the code in {folder} has more than {_MAX_FILES} files")
    return CustomCode(
        folder=str(folder.absolute()),
        model=references[model_class],
        config=references["AutoConfig"],
        files=tuple(files[module] for module in sorted(files)),
    )


def import_class(code: CustomCode, reference: str) -> type[Any]:
    """Import a class of a checkpoint's code.

    Raises
    ------
    UnsupportedOperationError
        If this process may not run custom code.
    CheckpointError
        If no copy of the code is here, or it fails.
    """
    module, _, name = reference.partition(".")
    package = _import_package(code)
    try:
        found: type[Any] = getattr(importlib.import_module(f"{package}.{module}"), name)
    except Exception as error:  # anything that somebody else's code raises
        raise CheckpointError(
            f"{reference} of {code.folder} can't be imported: {type(error).__name__}: {error}; install what it needs, or correct it"
        ) from error
    if not isinstance(found, type):
        raise CheckpointError(f"{reference} of {code.folder} is not a class: correct auto_map in its config.json")
    return found


def is_verified(path: str) -> bool:
    """Return whether a file is code of a checkpoint that was imported as its caller described it."""
    return any(path == known for known, _ in _finder.modules.values())


class _VerifiedLoader(importlib.machinery.SourceFileLoader):
    """Imports a module from bytes that have been compared with their digest, whatever is in the file by now."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_data(self, path: str) -> bytes:
        if path != self.path:  # compiled code, which nobody has verified
            raise OSError(path)
        return self._source

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        pass


class _Finder:
    """Finds the modules of packages that have been verified."""

    def __init__(self) -> None:
        self.modules: dict[str, tuple[str, bytes]] = {}

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> Any:
        if name not in self.modules:
            return None
        path, source = self.modules[name]
        return importlib.util.spec_from_file_location(name, path, loader=_VerifiedLoader(name, path, source))


_finder = _Finder()


def _import_package(code: CustomCode) -> str:
    """Make a package of the code's files, verified, and return its name; once for the same content."""
    if _roots is not None and not _roots:
        raise UnsupportedOperationError(_NOT_ALLOWED)
    facts = [f"{file.module}:{file.digest}" for file in code.files]
    name = PACKAGE + _digest("\n".join(facts).encode())[:16]
    if name not in sys.modules:
        folder, sources = _verified(code)
        if _finder not in sys.meta_path:
            sys.meta_path.append(_finder)
        for module, source in sources.items():
            _finder.modules[f"{name}.{module}"] = str(folder / f"{module}.py"), source
        package = types.ModuleType(name)
        package.__path__ = []
        sys.modules[name] = package
    return name


def _verified(code: CustomCode) -> tuple[Path, dict[str, bytes]]:
    """Read the first copy of the code that is equal to what the caller has."""
    if len(code.files) > _MAX_FILES or not all(file.module.isidentifier() for file in code.files):
        raise CheckpointError(f"the code of {code.model} names files that can't be modules")
    tried = []
    for folder in _folders_of(code):
        try:
            sources = {file.module: _read(folder, file.module) for file in code.files}
        except CheckpointError:
            continue
        wrong = [file.module for file in code.files if _digest(sources[file.module]) != file.digest]
        if not wrong:
            return folder, sources
        tried.append(f"{wrong[0]}.py in {folder} differs")
    raise CheckpointError(
        f"there is no copy of the code of {code.model} here that is equal to the caller's ({'; '.join(tried) or 'none was found'}): "
        "copy the files of the checkpoint to this host"
    )


def _folders_of(code: CustomCode) -> Iterator[Path]:
    """Yield the folders in which a copy may lie."""
    if _roots is None:
        yield Path(code.folder)
        return
    first = f"{code.files[0].module}.py" if code.files else ""
    for root in _roots:
        for path, folders, names in os.walk(root):
            if len(Path(path).relative_to(root).parts) >= _MAX_DEPTH:
                folders.clear()
            if first in names:
                yield Path(path)


def _read(folder: Path, module: str) -> bytes:
    try:
        return (folder / f"{module}.py").read_bytes()
    except OSError as error:
        raise CheckpointError(f"the code {module}.py of the checkpoint {folder} can't be read: {error}") from error


def _imported(source: bytes, path: Path) -> list[str]:
    """Return the modules of the same folder that code imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"{path} is not Python code: {error}") from error
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    names = [[node.module.partition(".")[0]] if node.module else [each.name for each in node.names] for node in found]
    return list(dict.fromkeys(itertools.chain.from_iterable(names)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
