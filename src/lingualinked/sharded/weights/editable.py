"""The methods of a sharded model that change it for a while: skipped layers, and the edits of its weights.

Knows the public face; imports no torch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lingualinked.sharded.sealed.layer_surgery import LayerSurgery
    from lingualinked.sharded.weights.weight_edits import WeightEdit, WeightEditor


class Editable:
    """Mixin with ``edits`` and ``skip_layers``."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _editor: WeightEditor
        _surgery: LayerSurgery

    @property
    def edits(self) -> tuple[WeightEdit, ...]:
        """The edits of its weights that are in force, by tensor, in order; statements in a row are one edit."""
        return self._editor.list_edits()

    def skip_layers(self, *indices: int) -> contextlib.AbstractContextManager[None]:
        """Skip layers within a ``with`` block, as if they were deleted from the model's list of layers.

        ``del model.model.layers[5]`` does it for good, until ``insert`` puts the layer back.

        Parameters
        ----------
        *indices : int
            Of the layers, in the list as it is.

        Returns
        -------
        context manager
            The list is as before at its end.

        Raises
        ------
        UnsupportedOperationError
            If no layer would be left.
        """
        return self._surgery.skipping(indices)
