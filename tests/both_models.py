"""One checkpoint twice, uncut and in stages: an experiment runs on both, and what it returns must be equal bit for bit.

Knows how results are compared; nothing of what an experiment does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class BothModels:
    """A sharded model and the uncut one with the same weights and settings."""

    sharded: Any
    uncut: Any

    def run(self, experiment: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run the same code on both models, compare all that it returns, and return it.

        The tests then assert that what was done to the model has changed something.
        """
        return self.run_each(experiment, experiment, *args, **kwargs)

    def run_each(self, ours: Callable[..., Result], theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Result:
        """Run two forms of an experiment, the first on the sharded model and the second on the uncut one; compare as `run`."""
        result = _run(ours, self.sharded, args, kwargs)
        compare("result", result, _run(theirs, self.uncut, args, kwargs))
        hooked = [path for path, each in self.sharded.named_modules() if each._forward_hooks or each._forward_pre_hooks]
        assert hooked == [], f"{ours.__name__} left hooks on {hooked}"
        return result


def _run(experiment: Callable[..., Result], model: Any, args: Any, kwargs: Any) -> Result:
    torch.manual_seed(0)
    return experiment(model, *args, **kwargs)


def compare(where: str, ours: Any, theirs: Any) -> None:
    """Fail at the first part of two results that differs."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), f"{where}: {type(ours).__name__} for a tensor"
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert torch.equal(ours, theirs), f"{where}: {(ours != theirs).sum()} of {ours.numel()} numbers differ"
        return
    assert type(ours) is type(theirs), f"{where}: {type(ours).__name__} for {type(theirs).__name__}"
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for name, value in theirs.items():
            compare(f"{where}[{name!r}]", ours[name], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            compare(f"{where}[{index}]", our, their)
    else:
        assert ours == theirs, f"{where}: {ours} for {theirs}"
