"""Every import of the package leads downwards, whatever its kind: of a module, late in a function, for annotations alone.

import-linter checks rooms; this test also counts modules, and reads the one contract that says which room lies where.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lingualinked"
FACE = "lingualinked"
BY_NAME = {FACE, "lingualinked.model.custom_code", "lingualinked.transport"}
"""They resolve their public names on first use, or import a checkpoint's code; elsewhere no import of the package's own hides in a string."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> Iterator[str]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                yield inner if inner in MODULES else node.module


IMPORTS = {module: sorted(set(imports_of(module))) for module in MODULES}


@functools.cache
def layers() -> list[tuple[frozenset[str], bool]]:
    """Return rooms from the highest down, and whether those of a layer may know each other."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contract = next(each for each in settings["contracts"] if each["type"] == "layers")
    found = []
    for line in contract["layers"]:
        names = line.replace("|", " ").replace(":", " ").replace("(", " ").replace(")", " ").split()
        found.append((frozenset(names), "|" not in line))
    return found


def place_of(module: str) -> tuple[float, str]:
    """Return how low a module's room lies, and its name; the public names lie between the command line and the rest."""
    if module == FACE:
        return 0.5, ""
    room = module.split(".")[1]
    return next(index for index, (rooms, _) in enumerate(layers()) if room in rooms), room


def is_downward(source: str, target: str) -> bool:
    (height, room), (depth, other) = place_of(source), place_of(target)
    return height < depth or room == other or (height == depth and layers()[int(depth)][1])


def is_own(name: ast.expr) -> bool:
    """Whether what is imported by name may lie in this package: it does not begin with another's."""
    first = name.values[0] if isinstance(name, ast.JoinedStr) else name
    text = first.value if isinstance(first, ast.Constant) else ""
    return not isinstance(text, str) or text.split(".")[0] in ("", "lingualinked")


def test_imports_of_every_kind_are_seen() -> None:
    assert len(MODULES) > 150
    assert "lingualinked.planning.predicting" in IMPORTS["lingualinked.planning.plan"]  # in a function
    assert "lingualinked.cluster.cluster" in IMPORTS["lingualinked"]  # for annotations
    assert "lingualinked.errors" in IMPORTS["lingualinked.device"]


def test_no_circle_among_modules() -> None:
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"these modules import each other: {' -> '.join(reversed(error.args[1]))}") from None


def test_the_layers_are_the_contracts() -> None:
    assert place_of("lingualinked.cli.app") < place_of(FACE) < place_of("lingualinked.sharded.model")
    assert not is_downward("lingualinked.planning.plan", "lingualinked.display.plan_view")
    assert not is_downward("lingualinked.planning.plan", "lingualinked.telemetry.samples")  # side by side


def test_no_import_leads_upwards() -> None:
    upward = [
        f"{source} -> {target}"
        for source, targets in IMPORTS.items()
        for target in targets
        if not is_downward(source, target)
    ]
    assert upward == []


def test_no_import_hides_in_a_string() -> None:
    hidden = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        if is_own(node.args[0])
    }
    assert hidden <= BY_NAME


def test_messages_load_no_transformers() -> None:
    """Whoever speaks the protocol needs its plain data alone."""
    reached = [module for module in MODULES if module.startswith("lingualinked.protocol.")]
    for module in reached:
        reached += [each for each in loaded_with(module) if each in MODULES and each not in reached]
    assert "lingualinked.model.sampling.processor_data" in reached
    assert [module for module in reached if any(each.startswith("transformers") for each in loaded_with(module))] == []


def loaded_with(module: str) -> Iterator[str]:
    """Yield what a module imports when it is imported, by the names in its statements."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (str(node.module), *(f"{node.module}.{each.name}" for each in node.names))


def test_no_exception_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings = tomllib.loads(text)["tool"]["importlinter"]
    assert "exclude_type_checking_imports" not in settings
    for contract in settings["contracts"]:
        assert not contract.keys() & {"ignore_imports", "allow_indirect_imports"}, contract["name"]


def test_a_late_import_says_why() -> None:
    silent = []
    for module, path in MODULES.items():
        if module in (
            "lingualinked.cli.app",
            "lingualinked.cli.bench.commands",
        ):  # their headers say it of all commands
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for function in ast.walk(tree_of(module)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
                if any(name in MODULES for name in names) and "#" not in "".join(
                    lines[node.lineno - 3 : node.end_lineno]
                ):
                    silent.append(f"{module}:{node.lineno}")
    assert silent == []


def test_no_file_is_long() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}
