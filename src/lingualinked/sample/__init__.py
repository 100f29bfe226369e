"""The small trained checkpoint that ships inside the package, and heads on it.

Knows only where its files are; how they were made stands in the model cards and in `sample_model/` of the repository.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from lingualinked.disk_cache import cache_folder
from lingualinked.errors import ArgumentError

_FOLDER = Path(__file__).parent
_WEIGHTS, _HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_INDEX = "model.safetensors.index.json"


def sample_model(head: Literal["sentiment"] | None = None) -> str:
    """Return the folder of the bundled sample checkpoint.

    Parameters
    ----------
    head : "sentiment" or None
        ``"sentiment"``: the same layers with a head that tells whether a review is positive, for
        ``pipeline("sentiment-analysis")``. The folder is in the user's cache folder, and made by the first call.

    Returns
    -------
    str
        A local folder that `ShardedModel.from_pretrained` and ``AutoTokenizer.from_pretrained`` take; its
        ``README.md`` is the model card with prompt formats and held-out accuracies.

    Raises
    ------
    ArgumentError
        If there is no such head.
    """
    if head is None:
        return str(_FOLDER)
    if head != "sentiment":
        raise ArgumentError(f"sample_model({head!r}): the only head is 'sentiment'; leave it out for the causal LM")
    return str(_folder_with_head(_FOLDER / head))


@functools.cache
def _folder_with_head(head: Path) -> Path:
    """Return a folder in the cache folder that holds the checkpoint and a head; make it if it is not there."""
    digest = hashlib.blake2b(digest_size=8)
    own = (head / name for name in ("head.safetensors", "config.json", "post_processor.json", "README.md"))
    for path in (*own, _FOLDER / "model.safetensors", _FOLDER / "config.json", _FOLDER / "tokenizer.json"):
        digest.update(path.read_bytes())
    cache = cache_folder()
    if cache is not None:
        folder = cache / f"sample-{head.name}-{digest.hexdigest()}"
        if folder.is_dir():
            return folder
        with contextlib.suppress(OSError):  # a disk that is full or read-only
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                _write_with_head(head, Path(partial) / "model")
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(partial) / "model").replace(folder)
            return folder
    kept = tempfile.TemporaryDirectory()  # removed when the process ends
    _kept_folders.append(kept)
    _write_with_head(head, Path(kept.name) / "model")
    return Path(kept.name) / "model"


_kept_folders: list[tempfile.TemporaryDirectory[str]] = []


def _write_with_head(head: Path, folder: Path) -> None:
    """Write the checkpoint with a head into a new folder."""
    folder.mkdir()
    # 1) the weights, in two files
    shutil.copyfile(_FOLDER / "model.safetensors", folder / _WEIGHTS)
    shutil.copyfile(head / "head.safetensors", folder / _HEAD)
    names = {file: _tensor_names(folder / file) for file in (_WEIGHTS, _HEAD)}
    index = {"metadata": {}, "weight_map": {name: file for file, found in names.items() for name in found}}
    _write_json(folder / _INDEX, index)
    # 2) the config, and the tokenizer, which puts a text into the prompt that the checkpoint knows
    _write_json(folder / "config.json", _read_json(_FOLDER / "config.json") | _read_json(head / "config.json"))
    tokenizer = _read_json(_FOLDER / "tokenizer.json") | {"post_processor": _read_json(head / "post_processor.json")}
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True  # a text begins as it does within the prompt
    _write_json(folder / "tokenizer.json", tokenizer)
    shutil.copyfile(_FOLDER / "tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.copyfile(head / "README.md", folder / "README.md")


def _tensor_names(file: Path) -> list[str]:
    """Return the names in the header of a safetensors file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return [name for name in json.loads(content[8 : 8 + size]) if name != "__metadata__"]


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
