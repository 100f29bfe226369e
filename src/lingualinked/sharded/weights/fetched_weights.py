"""The data of a model's parameters and buffers as far as it was fetched, within a bound of bytes.

Knows names and sizes, and how to read a tensor from its worker; not what it is for.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor, nn

from lingualinked.sharded.weights.fetched_tensor import Editor, FetchedTensor
from lingualinked.sharded.weights.remote_tensor import Fetch

_MAX_KEPT_BYTES = 256 << 20
_MAX_SHARE = 0.25  # of the free memory, for one parameter that is larger: to fetch it again takes seconds


class FetchedWeights:
    """Fetches tensors, one at a time, and keeps those that were used last; may be used by several threads.

    ``read`` reads a tensor of a name, shape and dtype; ``check_open`` raises once the model is closed. Buffers are not kept: a model's steps may change them.
    What changes a fetched tensor is done by the ``editor``.
    """

    def __init__(
        self,
        read: Callable[[str, torch.Size, torch.dtype], Tensor],
        check_open: Callable[[], None],
        max_bytes: int = _MAX_KEPT_BYTES,
        editor: Editor | None = None,
    ) -> None:
        self._read = read
        self.check_open = check_open
        self._max_bytes = max_bytes
        self.editor = editor
        self._lock = threading.RLock()
        self._living: dict[str, list[weakref.ref[Tensor]]] = {}  # what is still used of what was fetched, by name
        self._kept: dict[str, FetchedTensor] = {}  # the one used last comes last
        self.num_kept_bytes = 0

    def fetch_of(self, tensor: Tensor, name: str) -> Fetch:
        """Return what fetches the data of a tensor on the meta device."""
        return functools.partial(self._fetch, name, tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter))

    def _fetch(self, name: str, shape: torch.Size, dtype: torch.dtype, keep: bool) -> FetchedTensor:
        self.check_open()
        with self._lock:
            fetched = self._kept.pop(name, None)
            if fetched is None:
                with torch.inference_mode(False):  # a tensor made in it could not be used for gradients later
                    data = self._read(name, shape, dtype)
                    fetched = FetchedTensor.of(data, name, self.editor)
                self._living[name] = [*self._alive(name), weakref.ref(data)]
                if not keep or not self._may_keep(fetched.nbytes):
                    return fetched
                self.num_kept_bytes += fetched.nbytes
            self._kept[name] = fetched
            while self.num_kept_bytes > max(self._max_bytes, fetched.nbytes):
                self.num_kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
            return fetched

    def _may_keep(self, num_bytes: int) -> bool:
        """Return whether one tensor may be kept, without any others if it is large."""
        return num_bytes <= self._max_bytes or num_bytes <= _MAX_SHARE * psutil.virtual_memory().available

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Let no other thread fetch anything in this context."""
        with self._lock:
            yield

    def rewrite(self, name: str, value: Tensor) -> None:
        """Write the new data of a tensor wherever it has been fetched to."""
        for ref in self._alive(name):
            if (data := ref()) is not None:
                with torch.no_grad():
                    data.copy_(value)

    def renew(self, name: str) -> None:
        """Drop the kept data of a tensor that has changed, and fetch it anew where it is still used."""
        if (kept := self._kept.pop(name, None)) is not None:
            self.num_kept_bytes -= kept.nbytes
            del kept
        used = [data for ref in self._alive(name) if (data := ref()) is not None]
        if used:
            self.rewrite(name, self._read(name, used[0].shape, used[0].dtype))

    def _alive(self, name: str) -> list[weakref.ref[Tensor]]:
        return [ref for ref in self._living.get(name, ()) if ref() is not None]
