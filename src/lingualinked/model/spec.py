"""What a worker must be told to build any stage of a model: plain data that travels.

Knows neither torch nor transformers, and nothing of spans or devices.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """A file of weights, and what tells whether it is still the one that was read first.

    Parameters
    ----------
    path : str
        Absolute and local.
    device, inode : int
        Which file it is, symbolic links followed.
    num_bytes : int
        Its size.
    mtime_ns, ctime_ns : int
        When it was last written to, in nanoseconds, and when that or anything else about it last changed: whoever
        replaces or rewrites a file may set the one back, not the other.
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
        As the user asked for; None is transformers' default.
    load_format : {"safetensors", "dummy", "blank"}
        Read the weights from `files`, fill in seeded random ones, or any that serve to measure times with.
    files : tuple of CheckpointFile
        The safetensors files, as they were when the checkpoint was first read; empty but for ``"safetensors"``.
    seed : int, default=0
        Of the dummy weights.
    """

    class_name: str
    config_json: str
    dtype: str
    attn_implementation: str | None
    load_format: Literal["safetensors", "dummy", "blank"]
    files: tuple[CheckpointFile, ...]
    seed: int = 0
