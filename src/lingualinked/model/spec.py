"""Everything that a worker needs to build any stage of a model, as plain data that is sent to it.

Knows neither torch nor transformers; no spans and no devices.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """A file of weights, with the attributes that show whether it has changed since it was first read.

    Parameters
    ----------
    path : str
        Absolute and local.
    device, inode : int
        Identity of the file, after following symbolic links.
    num_bytes : int
        Its size.
    mtime_ns, ctime_ns : int
        Times of its last modification and of the last change of its attributes, in nanoseconds. A program that replaces
        or rewrites a file can reset the first, not the second.
    """

    path: str
    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model and where its weights come from, the same for every stage.

    Parameters
    ----------
    class_name : str
        The transformers class, e.g. ``"LlamaForCausalLM"``.
    config_json : str
        The full configuration as JSON (``use_diff=False``), ``model_type`` included.
    dtype : str
        Name of the floating torch dtype of the weights, already resolved: ``"bfloat16"``, never ``"auto"``.
    attn_implementation : str or None
        As the user requested it; None is transformers' default.
    load_format : {"safetensors", "dummy", "blank"}
        Read the weights from `files`, use seeded random ones, or use arbitrary ones for measuring times.
    files : tuple of CheckpointFile
        The safetensors files, as they were when the checkpoint was first read; empty unless ``"safetensors"``.
    seed : int, default=0
        Seed of the dummy weights.
    """

    class_name: str
    config_json: str
    dtype: str
    attn_implementation: str | None
    load_format: Literal["safetensors", "dummy", "blank"]
    files: tuple[CheckpointFile, ...]
    seed: int = 0
