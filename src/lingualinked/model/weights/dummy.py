"""Random weights for experiments without a checkpoint; they depend on seed and parameter, not on the cut.

Knows names and shapes only; no files.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from lingualinked.model.weights.weight_sources import untied_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

_STD = 0.02
_BLANK_ELEMENTS = 1 << 18


class DummyWeights:
    """Seeded random values for every parameter of a model; tied ones under their source's name alone.

    All are uniform with the standard deviation of a model's initialisation, around 0, or around 1 for the weights of norms.
    Each parameter is generated in its own dtype.
    """

    def __init__(self, meta_model: PreTrainedModel, seed: int) -> None:
        self._like = untied_parameters(meta_model)
        self._seed = seed
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._like.items()
        }
        self.num_bytes_read = 0

    def prepare(self, names: Iterable[str]) -> None:
        """Do nothing: each is generated when it is read."""

    def read_tensor(self, name: str) -> torch.Tensor:
        """Generate one parameter."""
        like = self._like[name]
        return self._fill(name, torch.empty(like.shape, dtype=like.dtype))

    def _fill(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        centre = 1.0 if self._like[name].ndim == 1 and name.endswith("weight") else 0.0
        half_width = _STD * 3**0.5  # of a uniform distribution with this standard deviation
        return tensor.uniform_(centre - half_width, centre + half_width, generator=generator)

    def close(self) -> None:
        """Do nothing: there is no file."""


class BlankWeights(DummyWeights):
    """Weights for measuring times, made quickly: the first part of a large tensor is random, and the rest repeats it."""

    def read_tensor(self, name: str) -> torch.Tensor:
        """Fill one parameter."""
        like = self._like[name]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        flat = tensor.view(-1)
        for start in range(0, len(flat), _BLANK_ELEMENTS):
            part = flat[start : start + _BLANK_ELEMENTS]
            part.copy_(flat[: len(part)]) if start else self._fill(name, part)
        return tensor
