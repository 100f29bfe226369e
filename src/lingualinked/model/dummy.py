"""Random weights for experiments without a checkpoint, the same for a seed and a parameter however the model is cut.

Knows names and shapes only; nothing of files.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from lingualinked.model.weights import untied_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_STD = 0.02
_BLANK_ELEMENTS = 1 << 18


class DummyWeights:
    """Seeded random values for every parameter of a model.

    Matrices are uniform with mean 0 and the standard deviation that models are initialised with; vectors are likewise
    but for norms' weights, which lie around 1. Parameters of another dtype than the model's own are rounded from it.

    Parameters
    ----------
    meta_model : PreTrainedModel
        The whole model, on the meta device.
    seed : int

    Attributes
    ----------
    shapes : dict of str to tuple of int
        By parameter name; tied parameters under their source's name alone, as in a checkpoint.
    num_bytes_read : int
        Always 0.
    """

    def __init__(self, meta_model: PreTrainedModel, seed: int) -> None:
        self._like = untied_parameters(meta_model)
        self._seed = seed
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._like.items()
        }
        self.num_bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        """Generate one parameter."""
        like = self._like[name]
        return self._fill(name, torch.empty(like.shape, dtype=like.dtype))

    def _fill(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        centre = 1.0 if self._like[name].ndim == 1 and name.endswith("weight") else 0.0
        reach = _STD * 3**0.5  # a uniform distribution's half width, by its standard deviation
        return tensor.uniform_(centre - reach, centre + reach, generator=generator)

    def close(self) -> None:
        """Do nothing: there is no file."""


class BlankWeights(DummyWeights):
    """Weights to measure times with, made fast: of a large tensor a first part is random, and the rest repeats it."""

    def read(self, name: str) -> torch.Tensor:
        """Fill one parameter."""
        like = self._like[name]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        flat = tensor.view(-1)
        for start in range(0, len(flat), _BLANK_ELEMENTS):
            part = flat[start : start + _BLANK_ELEMENTS]
            part.copy_(flat[: len(part)]) if start else self._fill(name, part)
        return tensor
