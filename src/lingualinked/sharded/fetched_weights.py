"""The data of a model's parameters and buffers as far as it was fetched, within a bound of bytes.

Knows names and sizes, and how to read a tensor from its worker; not what it is for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lingualinked.sharded.fetched_tensor import FetchedTensor
from lingualinked.sharded.remote_tensor import Fetch

_MAX_KEPT_BYTES = 256 << 20


class FetchedWeights:
    """Fetches tensors, one at a time, and keeps those that were used last; may be used by several threads.

    ``read`` reads a tensor of a name, shape and dtype; ``check_open`` raises once the model is closed. Buffers are not kept: a model's steps may change them.
    """

    def __init__(
        self,
        read: Callable[[str, torch.Size, torch.dtype], Tensor],
        check_open: Callable[[], None],
        max_bytes: int = _MAX_KEPT_BYTES,
    ) -> None:
        self._read = read
        self._check_open = check_open
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, FetchedTensor] = {}  # the one used last comes last
        self.num_kept_bytes = 0

    def fetch_of(self, tensor: Tensor, name: str) -> Fetch:
        """Return what fetches the data of a tensor on the meta device."""
        return functools.partial(self._fetch, name, tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter))

    def _fetch(self, name: str, shape: torch.Size, dtype: torch.dtype, keep: bool) -> FetchedTensor:
        self._check_open()
        with self._lock:
            fetched = self._kept.pop(name, None)
            if fetched is None:
                with torch.inference_mode(False):  # a tensor made in it could not be used for gradients later
                    fetched = FetchedTensor.of(self._read(name, shape, dtype), name)
                if not keep or fetched.nbytes > self._max_bytes:
                    return fetched
                self.num_kept_bytes += fetched.nbytes
            self._kept[name] = fetched
            while self.num_kept_bytes > self._max_bytes:
                self.num_kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
            return fetched
