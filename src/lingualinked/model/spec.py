"""Everything that a worker needs to build any stage of a model, as plain data that is sent to it.

Knows neither torch nor transformers; no spans and no devices.
"""

from dataclasses import dataclass
from typing import Literal

from lingualinked.model.cutting.model_parts import ModelParts


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """A file of weights, with the attributes that show whether it has changed since it was first read."""

    path: str  # absolute and local
    device: int  # with the inode the file's identity, after following symbolic links
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int  # of its attributes; a program that rewrites a file can reset the time before, not this one


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContent:
    """What is in a file of weights, wherever it lies: equal on every host that has the same file."""

    name: str  # without folder: "model-00001-of-00002.safetensors"
    num_bytes: int
    header_bytes: int  # its length included
    header_digest: str  # BLAKE2b of the header, in hexadecimal digits
    fingerprint: str  # BLAKE2b of the header, the file's length, and 64 bytes from the middle of every tensor
    tensor_digests: tuple[
        str, ...
    ] = ()  # SHA-256 of each tensor, by its place in the file; empty unless all is verified


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeFile:
    """A file of Python code beside a checkpoint."""

    module: str  # its name without folder and suffix: "modeling_own"
    digest: str  # SHA-256, in hexadecimal digits


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomCode:
    """The code of a checkpoint whose architecture is not part of transformers: what runs is what these digests say."""

    folder: str  # absolute and local
    model: str  # "modeling_own.OwnForCausalLM"
    config: str  # "configuration_own.OwnConfig"; empty: a configuration of transformers
    files: tuple[CodeFile, ...]  # all that the classes import from the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model and where its weights come from, the same for every stage."""

    class_name: str  # of transformers: "LlamaForCausalLM"
    config_json: str  # the full configuration (`use_diff=False`), `model_type` included
    dtype: str  # of the weights, already resolved: "bfloat16", never "auto"
    attn_implementation: str | None  # as the user requested it; None is transformers' default
    load_format: Literal["safetensors", "dummy", "blank"]  # "blank" weights are arbitrary, for measuring times
    files: tuple[CheckpointFile, ...]  # empty unless "safetensors"
    seed: int = 0  # of the dummy weights
    contents: tuple[FileContent, ...] = ()  # of `files`, in their order; empty unless a worker is on another host
    config_digest: str = ""  # BLAKE2b of the config.json beside the files; empty without one, or without `contents`
    towers: bool = True  # whether the first stage holds what encodes pictures, if the model has it
    stack: Literal["", "encoder", "decoder"] = ""  # which of an encoder-decoder model's stacks; "" for other models
    batch_invariant: bool = False  # whether no row's bits may depend on other rows, or the model is refused
    parts: ModelParts | None = None  # once they are found, so that workers need not find them
    code: CustomCode | None = None  # of the class, where it is not one of transformers
