"""Code beside a checkpoint runs where it may, and only as the caller has seen it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lingualinked as ll
from custom_checkpoints import AUTO_MAP, write_code
from lingualinked.model import custom_code
from lingualinked.model.custom_code import find_code, import_class, restrict_to
from lingualinked.model.spec import CodeFile, CustomCode

AUTO = "AutoModelForCausalLM"


@pytest.fixture(autouse=True)
def unrestricted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(custom_code, "_roots", None)
    return


@pytest.fixture
def code(tmp_path: Path) -> CustomCode:
    """Code whose content no other test has imported."""
    write_code(tmp_path / "own")
    with (tmp_path / "own" / "layers_own.py").open("a") as file:
        file.write(f"\nPLACE = {str(tmp_path)!r}\n")
    return find_code(tmp_path / "own", AUTO_MAP, AUTO)


def test_all_that_the_classes_import_from_the_folder_is_found(code: CustomCode) -> None:
    assert [file.module for file in code.files] == ["configuration_own", "layers_own", "modeling_own"]
    model, config = import_class(code, code.model), import_class(code, code.config)
    assert model.__name__ == "OwnForCausalLM"
    assert model.config_class is config
    assert import_class(code, code.model) is model


def test_what_has_changed_since_is_not_run(code: CustomCode) -> None:
    path = Path(code.folder) / "layers_own.py"
    path.write_text(path.read_text() + "\nraise AssertionError('this ran')\n")
    with pytest.raises(
        ll.CheckpointError, match=r"no copy of the code of modeling_own.OwnForCausalLM .*layers_own.py in .* differs"
    ):
        import_class(code, code.model)


def test_a_process_that_may_not_run_code_says_so(code: CustomCode) -> None:
    restrict_to(())
    with pytest.raises(ll.UnsupportedOperationError, match="--trust-remote-code"):
        import_class(code, code.model)


def test_a_worker_elsewhere_reads_its_own_copy(code: CustomCode, tmp_path: Path) -> None:
    restrict_to([tmp_path / "models"])
    with pytest.raises(ll.CheckpointError, match="none was found"):
        import_class(code, code.model)
    other = tmp_path / "models" / "elsewhere" / "copy"
    shutil.copytree(code.folder, other)
    assert import_class(code, code.model).__module__.endswith("modeling_own")
    found = import_class(code, "layers_own.OwnLayer")
    assert found.forward.__code__.co_filename == str(other / "layers_own.py")


@pytest.mark.parametrize("module", ["../modeling_own", "/etc/passwd", "a.b", ""])
def test_only_files_of_the_folder_are_read(code: CustomCode, module: str) -> None:
    asked = dataclasses.replace(code, files=(*code.files, CodeFile(module=module, digest="0" * 64)))
    with pytest.raises(ll.CheckpointError, match="can't be modules"):
        import_class(asked, code.model)


@pytest.mark.parametrize("reference", ["somebody/else--modeling_own.OwnForCausalLM", "OwnForCausalLM", "a/b.C", 3])
def test_code_that_is_not_in_the_folder_is_refused(tmp_path: Path, reference: object) -> None:
    write_code(tmp_path)
    with pytest.raises(ll.CheckpointError, match="does not name a class in a file of the folder"):
        find_code(tmp_path, {AUTO: reference}, AUTO)


def test_code_that_can_not_be_read_or_run_is_refused_by_name(tmp_path: Path) -> None:
    write_code(tmp_path)
    (tmp_path / "layers_own.py").unlink()
    with pytest.raises(ll.CheckpointError, match=r"layers_own\.py of the checkpoint"):
        find_code(tmp_path, AUTO_MAP, AUTO)
    (tmp_path / "layers_own.py").write_text("def :")
    with pytest.raises(ll.CheckpointError, match=r"layers_own\.py is not Python code"):
        find_code(tmp_path, AUTO_MAP, AUTO)
    (tmp_path / "layers_own.py").write_text("import a_package_that_nobody_has")
    found = find_code(tmp_path, AUTO_MAP, AUTO)
    with pytest.raises(ll.CheckpointError, match="a_package_that_nobody_has"):
        import_class(found, found.model)
