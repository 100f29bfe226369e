"""What makes no sense on a model whose layers are elsewhere: refused with the remedy, never half done.

Knows names and remedies only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from lingualinked.errors import UnsupportedOperationError

_WEIGHTS = "its weights are in the workers; read them from the checkpoint, or load it unsharded with transformers"
_MOVE = "its stages stay where the plan puts them; choose devices= and dtype= in ShardedModel.from_pretrained"
_TRAIN = "it is for inference; train the unsharded model"
_CHANGE = "change the checkpoint with transformers first, then load it sharded"
_BATCH = "continuous batching is not supported yet; call generate with a padded batch"

_REMEDIES = {
    **dict.fromkeys(("state_dict", "load_state_dict", "save_pretrained", "push_to_hub", "share_memory"), _WEIGHTS),
    **dict.fromkeys(
        ("to", "to_empty", "cuda", "cpu", "xpu", "ipu", "half", "float", "double", "bfloat16", "type"), _MOVE
    ),
    **dict.fromkeys(("requires_grad_", "zero_grad", "gradient_checkpointing_enable", "enable_input_require_grads"), _TRAIN),
    **dict.fromkeys(
        (
            "add_adapter",
            "apply",
            "compile",
            "dequantize",
            "init_weights",
            "load_adapter",
            "resize_position_embeddings",
            "resize_token_embeddings",
            "set_attn_implementation",
            "set_experts_implementation",
            "set_input_embeddings",
            "set_output_embeddings",
            "tie_weights",
        ),
        _CHANGE,
    ),
    **dict.fromkeys(("continuous_batching_context_manager", "generate_batch", "init_continuous_batching"), _BATCH),
}


def _refusal(name: str, remedy: str) -> Callable[..., NoReturn]:
    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperationError(f"{name}() of a sharded model: {remedy}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {remedy}."
    return refuse


class UnsupportedOperations:
    """Mixin that overrides what a sharded model can't do."""

    def train(self, mode: bool = True) -> Any:
        """Return the model for ``mode=False``, which it always is; refuse to train."""
        if mode:
            raise UnsupportedOperationError(f"train() of a sharded model: {_TRAIN}")
        return super().train(False)  # type: ignore[misc]


for _name, _remedy in _REMEDIES.items():
    setattr(UnsupportedOperations, _name, _refusal(_name, _remedy))
