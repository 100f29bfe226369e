"""Finds the code of a checkpoint whose user trusts it: in its folder, or fetched from the hub beside its config.json.

Knows arguments and the hub; runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from lingualinked.errors import CheckpointError, UncuttableModelError
from lingualinked.model.custom_code import find_code
from lingualinked.model.cutting.tasks import GENERATION

if TYPE_CHECKING:
    from lingualinked.model.spec import CustomCode
    from lingualinked.sharded.loading.arguments import LoadArguments

_AUTO_CLASS = "AutoModelForCausalLM"


def find_custom_code(arguments: LoadArguments, hub: Mapping[str, Any]) -> CustomCode | None:
    """Return the code that a checkpoint names for its class; None where it names none, or the user does not trust it."""
    if not arguments.trust_remote_code:
        return None
    if isinstance(arguments.config, PreTrainedConfig):
        auto_map = getattr(arguments.config, "auto_map", None)
    else:
        source = arguments.path if arguments.config is None else os.fspath(arguments.config)
        try:
            auto_map = PreTrainedConfig.get_config_dict(source, **hub)[0].get("auto_map")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no usable config.json for {source!r}: {error}") from error
    if not isinstance(auto_map, dict) or _AUTO_CLASS not in auto_map:
        return None
    if arguments.task not in (None, GENERATION):
        raise UncuttableModelError(
            str(auto_map[_AUTO_CLASS]),
            f"custom code is cut for task={GENERATION!r}, not {arguments.task!r}: leave task out",
        )
    folder = Path(arguments.path) / hub["subfolder"]
    if folder.is_dir():
        return find_code(folder, auto_map, _AUTO_CLASS)

    def fetch(module: str) -> Path:
        try:
            found = cached_file(arguments.path, f"{module}.py", **hub)
        except OSError as error:
            raise CheckpointError(f"the code {module}.py of {arguments.path!r} can't be fetched: {error}") from error
        assert found is not None
        return Path(found).parent

    return find_code(fetch(str(auto_map[_AUTO_CLASS]).partition(".")[0]), auto_map, _AUTO_CLASS, fetch)
