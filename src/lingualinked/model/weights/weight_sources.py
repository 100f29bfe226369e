"""Sources of weights, which know names and shapes, and materialise one tensor at a time.

Knows where weights come from; not which stage needs which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lingualinked.model.hf_internals import building
from lingualinked.model.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from lingualinked.model.spec import CheckpointFile

    Shape = tuple[int, ...]


class WeightSource(Protocol):
    """A source of weights: a checkpoint's files, generated values, or other workers."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor, by name."""

    @property
    def num_bytes_read(self) -> int:
        """Bytes read so far."""

    def prepare(self, names: Iterable[str]) -> None:
        """Make these tensors ready to be read: they are read next, and no others."""

    def read_tensor(self, name: str) -> torch.Tensor:
        """Materialise one tensor in new, aligned CPU memory."""

    def close(self) -> None:
        """Close all files."""


def untied_parameters(meta_model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model by name; tied ones only under their source's name, as in a checkpoint."""
    tied = building.ties(meta_model)
    return {
        name: parameter for name, parameter in meta_model.named_parameters(remove_duplicate=False) if name not in tied
    }


class LazyTensor:
    """A tensor that transformers' loader materialises by ``tensor[...]``, which reports the number of its elements."""

    def __init__(self, source: WeightSource, name: str, on_read: Callable[[int], None]) -> None:
        self._source, self._name, self._on_read = source, name, on_read

    def __getitem__(self, index: object) -> torch.Tensor:
        assert index is Ellipsis, "only whole tensors are read"
        tensor = self._source.read_tensor(self._name)
        self._on_read(tensor.numel())
        return tensor


class CheckpointWeights:
    """The tensors of a checkpoint's safetensors files; `num_bytes_read` includes headers."""

    def __init__(self, files: Sequence[CheckpointFile]) -> None:
        self._files = [SafetensorsFile(file) for file in files]
        self._file_of = {name: file for file in self._files for name in file.entries}
        self.shapes: Mapping[str, Shape] = {name: file.entries[name].shape for name, file in self._file_of.items()}
        self.num_bytes_read = sum(file.header_bytes for file in self._files)

    def prepare(self, names: Iterable[str]) -> None:
        """Do nothing: the files are here."""

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, and only its own bytes."""
        tensor = self._file_of[name].read_tensor(name)
        self.num_bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
