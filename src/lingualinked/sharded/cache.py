"""``past_key_values`` of a sharded model: a handle on KV that lies in the workers.

Knows transformers' cache interface and one session; it holds no keys and no values.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from lingualinked.cluster.session import Session
from lingualinked.errors import UnsupportedOperationError


class ShardedCache(Cache):
    """The KV cache of one session, as transformers' generation code handles it.

    It is what a sharded model returns as ``past_key_values`` and takes back in the next call. The KV is freed in
    every stage when the handle is no longer referenced, or by `end`.

    Parameters
    ----------
    session : Session
        The session whose KV it stands for.
    """

    def __init__(self, session: Session) -> None:
        # Not Cache.__init__: there are no layers here.
        self.layers = []
        self.session = session
        self._is_user_defined = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens whose KV is held."""
        return self.session.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the KV grows."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (int64 ``[rows]``), for beam search."""
        self.session.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises
        ------
        ValueError
            If the number is positive, as in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        self.session.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Have sliding layers keep what a crop needs, from the next step on."""
        self.session.record_past(True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        rows = [row for row in range(self.session.num_rows) for _ in range(repeats)]
        self.session.reorder(torch.tensor(rows, dtype=torch.long))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.session.reorder(indices)

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
        return self.session.num_tokens > 0

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        state = "ended" if self.session.ended else f"{self.session.num_rows} rows x {self.session.num_tokens} tokens"
        return f"<ShardedCache: {state}>"

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only the stages write KV."""
        raise UnsupportedOperationError("the KV of a sharded model is written by its workers alone")

    def reset(self) -> NoReturn:
        """Refuse: a new session starts with ``past_key_values=None``."""
        raise UnsupportedOperationError("reset() of a sharded KV cache: start anew with past_key_values=None instead")

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(
            "the KV cache of a sharded model can't be copied or pickled: it lies in the workers; "
            "run the common prefix again, or keep the one handle"
        )


