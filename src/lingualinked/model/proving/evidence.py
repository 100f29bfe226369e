"""Whether there is evidence that a model is exact when cut: a test's, that of a trial before, or that of a trial now.

Knows where evidence is kept; not how a trial is done.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
import transformers

from lingualinked.disk_cache import read_cached, write_cached
from lingualinked.errors import UncuttableModelError
from lingualinked.model import cutting, exact, hf_internals, kv, stages
from lingualinked.model.proving.small_copies import small_copies
from lingualinked.model.proving.trial import Trial, try_cutting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lingualinked.model.spec import ModelSpec

logger = logging.getLogger("lingualinked.model")

PROVEN_FILE = Path(__file__).with_name("proven.json")


class Proven(msgspec.Struct, frozen=True):
    """The model types that the tests have shown to be exact with one version of transformers, as causal LMs, or with pictures."""

    transformers: str
    model_types: tuple[str, ...]
    seeing: tuple[str, ...] = ()


def check_exact(config: PreTrainedConfig, spec: ModelSpec) -> None:
    """Check that a model is exact when it is cut; try a small copy of it if neither a test nor a trial before has shown it.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    spec : ModelSpec
        Of the model: its class, dtype and attention implementation; no file of it is read.

    Raises
    ------
    UncuttableModelError
        If a small copy of it, cut, differs from the same uncut.
    """
    if spec.code is None and is_proven(config.model_type, spec.class_name):
        return
    name = _file_name(config, spec)
    trial = _read_trial(name)
    if trial is None:
        trial = try_cutting(config, spec)
        if not trial.raised:  # memory may have been short
            write_cached(name, msgspec.json.encode(trial).decode())
    if trial.difference:
        raise UncuttableModelError(
            spec.class_name,
            f"a small copy of its configuration, with random weights, is not exact when it is cut here, with transformers "
            f"{transformers.__version__}: {trial.difference}",
        )
    logger.info(
        "%s is proven here: a small copy of it was exact when cut (%s)", spec.class_name, ", ".join(trial.exact)
    )


def is_proven(model_type: str, class_name: str) -> bool:
    """Return whether the tests have shown a model type to be exact, with the installed transformers."""
    proven = _proven()
    tables = transformers.models.auto.modeling_auto
    shown = (
        (proven.model_types, tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (proven.seeing, tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    return proven.transformers == transformers.__version__ and any(
        model_type in model_types and known.get(model_type) == class_name for model_types, known in shown
    )


def is_proven_with_pictures(model_type: str) -> bool:
    """Return whether the tests have shown a model type to be exact with pictures, which no trial tries."""
    proven = _proven()
    return proven.transformers == transformers.__version__ and model_type in proven.seeing


@functools.cache
def _proven() -> Proven:
    return msgspec.json.decode(PROVEN_FILE.read_bytes(), type=Proven)


def _read_trial(name: str) -> Trial | None:
    try:
        return msgspec.json.decode(read_cached(name) or b"", type=Trial)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _file_name(config: PreTrainedConfig, spec: ModelSpec) -> str:
    """Return a name that changes with what a trial depends on: the small copy, the libraries, and our own code."""
    small = next(small_copies(config), config)
    small.name_or_path = ""
    digest = hashlib.sha256()
    for each in (
        spec.class_name,
        small.to_json_string(use_diff=False),
        spec.dtype,
        spec.attn_implementation,
        spec.code and spec.code.files,
        transformers.__version__,
        torch.version.git_version,
        platform.machine(),
    ):
        digest.update(repr(each).encode())
    for module in (cutting, exact, hf_internals, kv, stages):
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return f"trial-{digest.hexdigest()[:16]}.json"
