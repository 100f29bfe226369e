"""The package as a whole: its public names, what importing it costs, what a wheel holds, and what it declares to need."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.version import Version

import hatch_build
import lingualinked
from lingualinked.kernels import native

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lingualinked"

# The whole public surface. A name that is added or removed here also stands in docs/api.md and in the changelog.
PUBLIC_NAMES = [
    "Ablate",
    "Add",
    "ArgumentError",
    "CheckpointError",
    "Clamp",
    "ClosedError",
    "Cluster",
    "Comparison",
    "Counters",
    "DaemonError",
    "Decision",
    "Device",
    "DeviceCounters",
    "DeviceMemoryError",
    "DeviceProfile",
    "DeviceSample",
    "DeviceSpecs",
    "Environment",
    "Explanation",
    "History",
    "InfeasiblePlanError",
    "KVCapacityError",
    "LingualinkedError",
    "Link",
    "LinkProfile",
    "MetricsEndpoint",
    "Migration",
    "ModelProfile",
    "ModuleTimes",
    "Move",
    "OverloadWarning",
    "PeerUnknownError",
    "Plan",
    "PlannedStage",
    "Prediction",
    "PrefillPrediction",
    "Profile",
    "Project",
    "ProtocolError",
    "RebalancePolicy",
    "Replace",
    "ResourceError",
    "Scale",
    "ShardedModel",
    "Simulation",
    "Solved",
    "StageSnapshot",
    "StageTiming",
    "StaleKVWarning",
    "StepCounters",
    "StepSample",
    "StepTime",
    "StepTimeoutError",
    "Telemetry",
    "UncuttableModelError",
    "UnreachableError",
    "UnsupportedOperationError",
    "WeightEdit",
    "WorkerDiedError",
    "WorkerError",
    "WorkerSnapshot",
    "Workload",
    "baseline",
    "edit",
    "estimate_profile",
    "hook",
    "profile_model",
    "sample_model",
    "simulate",
    "solve",
]

# Public names that stand on torch, transformers or zmq; using any other loads none of them.
HEAVY_NAMES = {"Cluster", "ShardedModel", "WeightEdit", "edit", "hook"}


def loaded_by(code: str) -> set[str]:
    """Return which of the heavy libraries a fresh interpreter has loaded after running `code`."""
    code += "; import sys; print(*({'torch', 'transformers', 'zmq'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_public_names_are_frozen() -> None:
    assert lingualinked.__all__ == PUBLIC_NAMES
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(lingualinked, name).__doc__
    assert name in dir(lingualinked)


def test_every_public_error_is_in_the_tree() -> None:
    errors = [getattr(lingualinked, name) for name in PUBLIC_NAMES if name.endswith("Error")]
    assert errors
    assert all(issubclass(error, lingualinked.LingualinkedError) for error in errors)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lingualinked.no_such_name


def test_import_loads_no_heavy_library() -> None:
    assert loaded_by("import lingualinked") == set()


def test_the_pytest_plugin_loads_no_heavy_library() -> None:
    assert loaded_by("import lingualinked.testing.plugin") == set()


def test_plain_data_loads_no_heavy_library() -> None:
    names = ", ".join(name for name in PUBLIC_NAMES if name not in HEAVY_NAMES)
    assert loaded_by(f"from lingualinked import {names}") == set()


def test_version_is_the_installed_one() -> None:
    assert lingualinked.__version__ == importlib.metadata.version("lingualinked")


def test_version_is_in_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == lingualinked.__version__


def test_wheel_holds_every_file_of_the_package() -> None:
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = [path for path in files if path.suffix != ".so"]  # what hatch_build.py compiles is no source file
    assert shipped == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert "lingualinked/py.typed" in shipped


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="no kernels for this platform")
def test_an_installed_package_holds_compiled_kernels() -> None:
    sources = list((PACKAGE / "kernels").glob("*.c"))
    assert sources
    assert all(list(source.parent.glob(f"lib{source.stem}*.so")) for source in sources)


def test_kernels_are_compiled_again_when_a_source_or_a_header_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / hatch_build.FOLDER
    folder.mkdir(parents=True)
    compiled: list[str] = []

    def compile_one(command: list[str | Path], check: bool) -> None:
        *_, library, source = command
        Path(library).touch()
        compiled.append(Path(source).name)

    monkeypatch.setattr(hatch_build.subprocess, "run", compile_one)
    for changed, expected in (("a.c", "a.c"), ("b.c", "b.c"), ("team.h", "a.c b.c"), ("a.c", "a.c")):
        with (folder / changed).open("a") as file:
            file.write("changed")
        hatch_build.compile_kernels(tmp_path)
        hatch_build.compile_kernels(tmp_path)
        assert sorted(compiled) == expected.split()
        assert set(folder.glob("*.so")) == {native.library_path(source) for source in folder.glob("*.c")}
        compiled.clear()


def test_api_reference_names_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: lingualinked\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == PUBLIC_NAMES


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines if not line.startswith("lingualinked[")]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_tested_version_is_pinned_and_in_range(requirement: Requirement) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    versions = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert Version(versions[requirement.name.lower()]) in requirement.specifier
