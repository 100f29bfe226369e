"""``past_key_values`` of a sharded model: a handle on KV that lies in the workers.

Knows transformers' cache interface and one session; it holds no keys and no values.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline

_ANEW = "start anew with past_key_values=None"


class ShardedCache(Cache):
    """The KV cache of one session, as transformers' generation code handles it.

    It is what a sharded model returns as ``past_key_values`` and takes back in the next call. The KV is freed in
    every stage when the handle is no longer referenced, or by `end`.

    Parameters
    ----------
    pipeline : Pipeline
        Where to open the session whose KV it stands for.
    sliding_window : int or None
        Tokens that the model's narrowest sliding layer sees, if it has such.
    """

    def __init__(self, pipeline: Pipeline, sliding_window: int | None = None) -> None:
        # Not Cache.__init__: there are no layers here.
        self.session = pipeline.open_session()
        self._pipeline = weakref.ref(pipeline)  # a kept handle keeps no model loaded
        self._num_layers = pipeline.plan.stages[-1].end
        self._sliding_window = sliding_window
        self._records_past = False
        self._is_user_defined = False

    def check(self, pipeline: Pipeline, num_rows: int) -> None:
        """Check that the next step of a model can go on from here.

        Raises
        ------
        ArgumentError
            If another model has made it, or it has another number of rows.
        """
        if self._pipeline() is not pipeline:
            raise ArgumentError(f"past_key_values are of another model: {_ANEW}")
        if self.is_initialized and num_rows != self.session.num_rows:
            raise ArgumentError(
                f"past_key_values hold the KV of {count_text(self.session.num_rows, 'row')}, and this step has {num_rows:,}: "
                "give as many, or use batch_repeat_interleave or batch_select_indices of past_key_values"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers hold as many
        """Return the number of tokens whose KV is held."""
        return self.session.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return -1: the KV grows."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (int64 ``[rows]``), for beam search."""
        self.session.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises
        ------
        ArgumentError
            If the number is positive or more than there are, or if a sliding window is full and has not recorded what
            it would have to bring back.
        """
        held = self.session.num_tokens
        if not -held <= tokens_to_remove <= 0:
            raise ArgumentError(
                f"crop({tokens_to_remove}) of {count_text(held, 'token')}: give minus the number of tokens to remove"
            )
        if self._sliding_window is not None and held >= self._sliding_window and not self._records_past:
            raise ArgumentError(
                f"crop({tokens_to_remove}) of {count_text(held, 'token')}: the sliding window "
                f"({count_text(self._sliding_window, 'token')}) is full; "
                "call activate_past_recording() before the first step"
            )
        self.session.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Have sliding layers keep what a crop needs, from the next step on."""
        self._records_past = True
        self.session.record_past(True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.session.reorder(torch.arange(self.session.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64, or a mask)."""
        self.session.reorder(torch.arange(self.session.num_rows)[indices.cpu()])

    def end(self) -> None:
        """Free the KV in every stage; the handle can't be used any more."""
        self.session.end()

    @property
    def batch_size(self) -> int:
        """Rows whose KV is held; -1 before the first step."""
        return self.session.num_rows or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a step has been run."""
        return self.session.num_rows > 0

    @property
    def is_compileable(self) -> bool:
        """Whether its shapes are static; they are not."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return True

    def __len__(self) -> int:
        """Return the number of the model's layers."""
        return self._num_layers

    def __repr__(self) -> str:
        rows, tokens = count_text(self.session.num_rows, "row"), count_text(self.session.num_tokens, "token")
        state = "ended" if self.session.ended else f"{rows} x {tokens}"
        return f"<ShardedCache: {state}>"

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse: they are in the workers, and so is whatever else transformers asks of them."""
        raise UnsupportedOperationError(
            "layers of a sharded KV cache: keys and values are in the workers, which alone read and write them"
        )

    def update(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: only the stages write KV."""
        raise UnsupportedOperationError("update() of a sharded KV cache: its KV is written by the workers alone")

    def reset(self) -> NoReturn:
        """Refuse: a new session is a new handle."""
        raise UnsupportedOperationError(f"reset() of a sharded KV cache: {_ANEW} instead")

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "the KV cache of a sharded model can't be copied or pickled: it lies in the workers; "
            "run the common prefix again, or keep the one handle"
        )
