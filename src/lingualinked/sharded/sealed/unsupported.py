"""Refuses the operations that a model can't do whose layers are in other processes.

Knows names and remedies only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from lingualinked.errors import UnsupportedOperationError

_WEIGHTS = "its weights are in the workers; save them with save_pretrained, and do it with the unsharded model"
_MOVE = "its stages stay where the plan puts them; choose devices= and dtype= in ShardedModel.from_pretrained"
_TRAIN = "it is for inference; train the unsharded model"
_CHANGE = "change the checkpoint with transformers first, then load it sharded"
_COMPILE = "its layers run uncompiled in the workers; call the model itself"
_ATTENTION = "its stages are loaded already; pass attn_implementation= to ShardedModel.from_pretrained"
_DEFAULT = "its stages run transformers' default; use the unsharded model for others"
_HOTSWAP = "adapters are added and deleted; call delete_adapter, then load_adapter"

_REMEDIES = {
    _WEIGHTS: (
        "gather_sharded_state_dict_for_save",
        "load_state_dict",
        "push_to_hub",
        "save_distributed_checkpoint",
        "share_memory",
    ),
    _MOVE: (
        "bfloat16",
        "cpu",
        "cuda",
        "double",
        "float",
        "half",
        "ipu",
        "maybe_distribute_model",
        "mtia",
        "to",
        "to_empty",
        "type",
        "xpu",
    ),
    _TRAIN: (
        "activation_checkpointing_enable",
        "disable_input_require_grads",
        "enable_input_require_grads",
        "gradient_checkpointing_enable",
    ),
    _CHANGE: (
        "dequantize",
        "init_weights",
        "initialize_weights",
        "resize_position_embeddings",
        "resize_token_embeddings",
        "set_decoder",
        "set_encoder",
        "set_extra_state",
        "set_input_embeddings",
        "set_output_embeddings",
        "set_submodule",
        "tie_weights",
    ),
    _COMPILE: (
        "compile",
        "get_compiled_call",
    ),
    _ATTENTION: ("set_attn_implementation",),
    _DEFAULT: (
        "set_experts_implementation",
        "set_use_kernels",
    ),
    _HOTSWAP: ("enable_peft_hotswap",),
}


def refusal(name: str, remedy: str) -> Callable[..., NoReturn]:
    """Return a method, of the whole model or of a sealed submodule, that raises `UnsupportedOperationError` with a remedy."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        path = vars(self).get("_path")
        submodule = "" if path is None else f"{path} ({type(self).__name__}) of "
        raise UnsupportedOperationError(f"{name}() of {submodule}a sharded model: {remedy}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {remedy}."
    return refuse


class UnsupportedOperations:
    """Mixin that overrides the methods that a sharded model does not support."""

    @property
    def _initialize_hook(self) -> NoReturn:
        """Refuse to be compiled: ``torch.compile`` looks for this name in what it wraps."""
        raise UnsupportedOperationError(f"torch.compile() of a sharded model: {_COMPILE}")

    def train(self, mode: bool = True) -> Any:
        """Return the model for ``mode=False``, its only mode; refuse to train."""
        if mode:
            raise UnsupportedOperationError(f"train() of a sharded model: {_TRAIN}")
        return super().train(False)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Return the model for ``requires_grad=False``, which always holds; refuse to train."""
        if requires_grad:
            raise UnsupportedOperationError(f"requires_grad_() of a sharded model: {_TRAIN}")
        return super().requires_grad_(False)  # type: ignore[misc]


for _remedy, _names in _REMEDIES.items():
    for _name in _names:
        setattr(UnsupportedOperations, _name, refusal(_name, _remedy))
