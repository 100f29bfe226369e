"""Finds copies of a checkpoint's files on this disk, by their content.

Knows folders of models and Hugging Face's cache; nothing of the network.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.constants import HF_HUB_CACHE

from lingualinked.errors import CheckpointError
from lingualinked.model.weight_files.describing import describe_file, digest_config, model_name
from lingualinked.model.weights.safetensors_file import identify_file
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lingualinked.model.spec import CheckpointFile, FileContent, ModelSpec

logger = logging.getLogger("lingualinked.model")

_MAX_DEPTH = 6  # below a folder of models
_MAX_FOLDERS = 20_000
_SKIPPED = {"blobs", "refs", ".locks", ".git", ".cache"}

_describe = functools.lru_cache(maxsize=4096)(describe_file)  # a file that changes is another key


def copy_folders(models: Path | None) -> list[Path]:
    """Return the folders in which copies of checkpoints, and of code beside them, may lie: of models, and Hugging Face's cache."""
    return [*([] if models is None else [models]), Path(HF_HUB_CACHE)]


class LocalCopies:
    """The files of checkpoints in a folder of models, and in Hugging Face's cache."""

    def __init__(self, models: Path | None = None, *, hub: bool = True) -> None:
        self._roots = copy_folders(models)[: None if hub else -1]

    def find(self, spec: ModelSpec) -> tuple[list[CheckpointFile | None], list[str]]:
        """Find a copy of each file of a model, and say of those that are called alike how they differ.

        A copy counts if its name, length and fingerprint are equal, and the values in the config.json beside it, if any.
        The caller's own path comes first: hosts may share a disk. How a file differs there is not said, since it may be
        any file of this user.
        """
        # 1) by names
        wanted = {content.name for content in spec.contents}
        shared: defaultdict[str, list[Path]] = defaultdict(list)
        named: defaultdict[str, list[Path]] = defaultdict(list)
        for file in spec.files:
            shared[Path(file.path).name].append(Path(file.path))
        for root in self._roots:
            for path in _walk(root, wanted):
                named[path.name].append(path)
        # 2) by their content
        found: list[CheckpointFile | None] = []
        differences: list[str] = []
        models = {model_name(Path(file.path)) for file in spec.files}
        for content in spec.contents:
            equal, differing = _compare(shared[content.name], content, spec.config_digest, models)
            if equal is None:
                equal, differing = _compare(named[content.name], content, spec.config_digest, models)
            found.append(equal)
            differences += [] if equal is not None else differing
        return found, differences


def _compare(
    paths: Iterable[Path], content: FileContent, config_digest: str, models: set[str]
) -> tuple[CheckpointFile | None, list[str]]:
    """Return the first file with this content, or None and how those differ that seem to be meant for it."""
    differences: list[str] = []
    for path in paths:
        try:
            file = identify_file(str(path))
        except CheckpointError:  # the caller's path, where nothing is
            continue
        if file.num_bytes != content.num_bytes:  # of another model, most likely: files of all models are called alike
            expected = f"{content.num_bytes:,} of the caller's"
            difference = f"has {count_text(file.num_bytes, 'byte')} in place of the {expected}"
            differences += [_describe_difference(path, difference)] if model_name(path) in models else []
            continue
        difference = _find_difference(file, content, config_digest)
        if not difference:
            return file, []
        differences.append(_describe_difference(path, difference))
    return None, differences


def _find_difference(file: CheckpointFile, content: FileContent, config_digest: str) -> str:
    """Say how a file of the right length differs; empty if it does not."""
    try:
        own = _describe(file)
    except CheckpointError as error:
        return f"can't be used: {error}"
    if own.header_digest != content.header_digest:
        return "differs from the caller's in its header: in the names, shapes or dtypes of tensors"
    if own.fingerprint != content.fingerprint:
        return "differs from the caller's in the values of its tensors"
    config = digest_config(Path(file.path).parent)
    if config and config_digest and config != config_digest:
        return "is the caller's, but the config.json beside it is not"
    return ""


def _describe_difference(path: Path, difference: str) -> str:
    return f"{path} on host {socket.gethostname()!r} {difference}"


def _walk(root: Path, names: set[str]) -> Iterator[Path]:
    """Find files by name below a folder, up to a depth; links to folders are followed once."""
    seen: set[tuple[int, int]] = set()
    level = [root]
    for _ in range(_MAX_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if len(seen) > _MAX_FOLDERS:
                    logger.warning("%s has more than %s folders: not all are searched for models", root, _MAX_FOLDERS)
                    return
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name in names:
                            yield Path(entry.path)
                        elif entry.name not in _SKIPPED and entry.is_dir():
                            below.append(Path(entry.path))
            except OSError:  # a folder that this user can't read, or that is gone
                continue
        level = sorted(below)
