"""What a ``ContinuousBatchingConfig`` and a ``GenerationConfig`` of transformers mean for a sharded model.

Knows their settings; each has its effect or is refused by name.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import GenerationMode

from lingualinked.cluster.sessions.row_sessions import PIECE_TOKENS
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.sharded.batching.events import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_REQUESTS = 64  # of a microbatch, unless the user says otherwise
_CHUNK_TOKENS = PIECE_TOKENS  # of prompts in a microbatch, likewise
_MIN_SHARED = 64  # tokens that a common beginning must exceed: fewer are computed sooner than copied
_SCHEDULERS = ("fifo", "prefill_first")

_GRAPHS = "packed steps of several requests run without graphs"
_COMPILED = "the layers run uncompiled in the workers"
_OFFLOADING = "KV stays in the workers, and requests wait until there is room for theirs"
_REFUSED: dict[str, tuple[Callable[[ContinuousBatchingConfig], bool], str]] = {
    "cpu_offload_space": (lambda config: config.cpu_offload_space != 0, _OFFLOADING),
    "decode_compile_config": (lambda config: config.decode_compile_config is not None, _COMPILED),
    "default_compile_level": (lambda config: config.default_compile_level != 0, _COMPILED),
    "kv_padding_interval_size": (lambda config: config.kv_padding_interval_size != 0, _GRAPHS),
    "max_memory_percent": (
        lambda config: config.max_memory_percent is not None,
        "max_kv_tokens of ShardedModel.from_pretrained, or num_blocks, says how much KV may be held",
    ),
    "q_padding_interval_size": (lambda config: config.q_padding_interval_size != 0, _GRAPHS),
    "use_cuda_graph": (lambda config: any(config.cuda_graph_booleans), _GRAPHS),
    "varlen_compile_config": (lambda config: config.varlen_compile_config is not None, _COMPILED),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How a manager schedules, and how many tokens of KV it may hold, and each text may have; ``None``: as many as its model."""

    limits: Limits
    max_kv_tokens: int | None
    max_text_tokens: int | None


def check_classes(generation: object, config: object) -> None:
    """Refuse what is no configuration, such as a dictionary."""
    for name, value, expected in (
        ("generation_config", generation, GenerationConfig),
        ("continuous_batching_config", config, ContinuousBatchingConfig),
    ):
        if value is not None and not isinstance(value, expected):
            raise ArgumentError(f"{name}={value!r} is a {type(value).__name__}: give a {expected.__name__}")


def check_config(config: ContinuousBatchingConfig) -> None:
    """Refuse what has no sharded counterpart, and what is out of range."""
    for name, (is_set, reason) in _REFUSED.items():
        if is_set(config):
            raise UnsupportedOperationError(
                f"{name}={getattr(config, name)!r} of a ContinuousBatchingConfig is not supported by a sharded model: {reason}; "
                "leave it out"
            )
    if config.scheduler_type not in _SCHEDULERS:
        raise ArgumentError(f"scheduler_type={config.scheduler_type!r} must be one of {_SCHEDULERS}")
    if config.safety_margin is not None and not 0 <= config.safety_margin <= 1:
        raise ArgumentError(f"safety_margin={config.safety_margin!r} must be from 0 to 1")
    for name in ("num_blocks", "max_batch_tokens", "max_requests_per_batch"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ArgumentError(f"{name}={value!r} must be at least 1")


def check_generation(generation: GenerationConfig) -> None:
    """Refuse what continuous batching would leave out, though it changes the tokens."""
    mode = generation.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION):
        raise UnsupportedOperationError(f"continuous batching does no {mode.value.replace('_', ' ')}: call generate")
    for name in ("guidance_scale", "max_time", "stop_strings", "token_healing", "compile_config"):
        value = getattr(generation, name)
        if value is not None and value is not False:
            raise UnsupportedOperationError(
                f"{name}={value!r} is not supported by continuous batching of a sharded model: leave it out, or call generate"
            )


def read_settings(
    config: ContinuousBatchingConfig,
    num_stages: int,
    *,
    has_sliding_layers: bool,
    num_positions: int | None,
    batch_invariant: bool = False,
) -> BatchSettings:
    """Return what a config means for a pipeline of so many stages; sliding layers forget what a shared beginning needs.

    Where texts are batch-invariant, chunks of prompts are the pieces that any step computes: none is cut, and none begins behind
    what another text has computed.
    """
    if batch_invariant and config.max_batch_tokens is not None:
        raise UnsupportedOperationError(
            f"max_batch_tokens={config.max_batch_tokens!r} with batch_invariant=True, whose prompts are cut into pieces of {PIECE_TOKENS} "
            "tokens: leave it out"
        )
    shares = config.allow_block_sharing and not has_sliding_layers and not batch_invariant
    max_requests = config.max_requests_per_batch or _MAX_REQUESTS
    limits = Limits(
        num_microbatches=1 if config.use_async_batching is False else num_stages,
        max_tokens=config.max_batch_tokens or _CHUNK_TOKENS + max_requests,
        chunk_tokens=config.max_batch_tokens or _CHUNK_TOKENS,
        max_requests=max_requests,
        prompts_first=config.scheduler_type == "prefill_first",
        min_shared=_MIN_SHARED if shares else sys.maxsize,
        margin=config.safety_margin or 0.0,
    )
    max_kv_tokens = None if config.num_blocks is None else config.num_blocks * config.page_size
    return BatchSettings(limits=limits, max_kv_tokens=max_kv_tokens, max_text_tokens=num_positions)
