"""A small model of random weights, saved as a checkpoint and loaded as transformers does: what a trial compares with.

Knows configurations and classes of transformers; no stages.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lingualinked.errors import UncuttableModelError
from lingualinked.model.cutting.architectures import read_config
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.hf_internals import building
from lingualinked.model.hf_internals.cache_arguments import cache_argument, keeps_cache
from lingualinked.model.hf_internals.loading import quiet_loading
from lingualinked.model.proving.small_copies import small_copies
from lingualinked.model.weights.checkpoint import resolve_files
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from lingualinked.model.spec import ModelSpec

_MAX_PARAMETERS = 50_000_000
_MAX_COPIES = 40
_STD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallModel:
    """A small model, uncut, and its specification for stages."""

    whole: PreTrainedModel
    spec: ModelSpec
    vocabulary: int


class Uncut:
    """A conversation with an uncut model, as ``generate`` holds it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)  # of some, the modules keep what they have seen
        self._known = forward_arguments(type(model))
        self._state_name = cache_argument(type(model))
        # Some use one that they are given, and do not return it.
        self._state: Any = DynamicCache(config=self._model.config) if keeps_cache(type(model)) else None
        self._num_seen = 0

    @torch.no_grad()
    def step(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of the new tokens, the last ones of `tokens` [rows, all tokens so far]."""
        new = slice(self._num_seen, None)
        arguments: dict[str, Any] = {
            "input_ids": tokens[:, new],
            "attention_mask": mask,
            "position_ids": positions_of(mask)[:, new],
        }
        if self._state_name:
            arguments |= {self._state_name: self._state, "use_cache": True}
        output = self._model(**{name: value for name, value in arguments.items() if name in self._known})
        if self._state_name:
            self._state, self._num_seen = output.get(self._state_name, self._state), tokens.shape[1]
        logits: Tensor = output.logits
        return logits


def forward_arguments(cls: type[PreTrainedModel]) -> frozenset[str]:
    """Return the names of the arguments that a class's forward takes."""
    return frozenset(inspect.signature(cls.forward).parameters)


def positions_of(mask: Tensor) -> Tensor:
    """Count positions in a padding mask [rows, tokens], as ``generate`` does."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def prompt(num_rows: int, num_tokens: int, vocabulary: int) -> Tensor:
    """Make token ids [rows, tokens], always the same, none of which a configuration is likely to name."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_tokens)
    lowest, above = min(10, vocabulary // 4), vocabulary - min(32, vocabulary // 4)
    return torch.randint(lowest, above, (num_rows, num_tokens), generator=generator)


def make_small_model(config: PreTrainedConfig, spec: ModelSpec, folder: Path) -> SmallModel:
    """Make the smallest copy of a model that transformers itself builds and runs, and save it in a folder.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model, of any size.
    spec : ModelSpec
        Of the model; its files and its configuration are not used.
    folder : Path
        Where to save checkpoints.

    Raises
    ------
    UncuttableModelError
        If there is no copy that transformers runs.
    """
    causes: list[str] = []
    for number, small in enumerate(itertools.islice(small_copies(config), _MAX_COPIES)):
        described = dataclasses.replace(
            spec,
            config_json=small.to_json_string(use_diff=False),
            load_format="safetensors",
            files=(),
            contents=(),
            config_digest="",
            parts=None,
        )
        try:
            num_parameters, whole = _make_whole(described, folder / str(number))
            if num_parameters > _MAX_PARAMETERS:
                causes.append(f"it has {count_text(num_parameters, 'parameter')}")
                break  # others are wider
            assert whole is not None
            vocabulary = whole.config.get_text_config(decoder=True).vocab_size
            tokens = prompt(2, 9, vocabulary)
            logits = Uncut(whole).step(tokens, torch.ones_like(tokens))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next copy may do without
            causes.append(f"{type(error).__name__}: {error}")
            continue
        if logits.isfinite().all():
            files = resolve_files(folder / str(number))
            return SmallModel(whole=whole, spec=dataclasses.replace(described, files=files), vocabulary=vocabulary)
        causes.append("its logits are not finite")
    raise UncuttableModelError(
        spec.class_name,
        "no test has shown yet that it is exact when cut, and transformers itself can't run a small copy of its configuration to "
        f"try it ({causes[0] if causes else 'no narrower one is valid'})",
    )


def _make_whole(spec: ModelSpec, folder: Path) -> tuple[int, PreTrainedModel | None]:
    """Save a model of random weights, and load it again; return its parameters' number, alone if there are too many."""
    meta, config = build_meta(spec), read_config(spec)
    num_parameters = sum(each.numel() for each in meta.parameters())
    if num_parameters > _MAX_PARAMETERS:
        return num_parameters, None
    cls, dtype = type(meta), getattr(torch, spec.dtype)
    model = building.build_untrained(cls, config, dtype, spec.attn_implementation, seed=0)
    # Every parameter is random, also those that begin as zeros or ones: none may be missed, none mistaken for another.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.empty(parameter.shape).normal_(std=_STD, generator=generator)
                parameter.add_(noise.to(parameter.dtype))
    with quiet_loading():
        model.save_pretrained(folder)
        arguments = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
        loader: Any = cls
        whole: PreTrainedModel = loader.from_pretrained(folder, dtype=dtype, **arguments)
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()  # mapped ones are not aligned, which shifts the last bits
    return num_parameters, whole.eval()
