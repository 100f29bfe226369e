"""Passes the bytes of tensors to another process of this machine through memory, beside the messages that say where they are.

Knows one file in memory (a memfd) and positions in it; no sockets and no wire format. The file has no name and ends with its
last user. The sender maps it. The receiver only reads and writes it by system calls, so that nothing that a sender does to its
file can end the receiver's process or make it wait for long, and only what was sent takes the receiver's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import mmap
import os
import secrets
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.quantities import count_text
from lingualinked.transport.memory.pinned_memory import PinnedMemory
from lingualinked.transport.wire.message_limits import KEPT_RING_BYTES, RING_BYTES
from lingualinked.transport.wire.tensor_bytes import is_plain, memory_of

logger = logging.getLogger("lingualinked.transport")

# The file begins with a token, which tells it from any other file, and the receipt: one byte, so that it is never seen half
# written, which only the receiver changes. Tensors lie behind this first page.
_TOKEN_BYTES = 16
_RECEIPT_OFFSET = 64
_FIRST_OFFSET = 4096
_ALIGNMENT = 64
_SIZE_SEALS = 0x2 | 0x4  # F_SEAL_SHRINK and F_SEAL_GROW, which Python does not have everywhere
_ALLOCATED_BYTES = 4 << 20  # at once; a signal makes some kernels begin again
_CLOSED = 0  # the receipt of a receiver that has closed its end
_MAX_UNREAD = 254  # messages; each has another receipt, and the last one that was confirmed has one too

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Receipt = Annotated[int, msgspec.Meta(ge=1, le=255)]
_Token = Annotated[bytes, msgspec.Meta(min_length=_TOKEN_BYTES, max_length=_TOKEN_BYTES)]


class RingOffer(NamedTuple):
    """How a receiver finds the ring that a sender has made for it, and the receipt to write once it has opened the ring."""

    token: _Token
    pid: _Natural
    descriptor: _Natural
    receipt: _Receipt


class Place(NamedTuple):
    """Where the tensors of a message are in a ring, and the receipt to write once they have been read."""

    token: _Token
    offset: _Natural
    receipt: _Receipt


class _Unread(NamedTuple):
    receipt: int
    start: int  # offset in the file
    end: int


class RingWriter:
    """The sender's end of one ring; makes the ring when it is first needed.

    `write` returns None until the receiver has opened the ring, and whenever there is no room: the message then carries its
    tensors itself. So do all messages where there are no such files, where the receiver is on another machine or of another
    user, and once it has confirmed what it was not sent.
    """

    def __init__(self, peer: str, capacity: int = RING_BYTES, kept_bytes: int = KEPT_RING_BYTES) -> None:
        self._peer = peer  # for the log
        self.num_written_bytes = 0  # of all tensors so far
        self._end = _FIRST_OFFSET + capacity
        self._kept_end = min(_FIRST_OFFSET + kept_bytes, self._end)
        self._file: int | None = None
        self._is_usable = True
        self._offer: RingOffer | None = None
        self._unread: deque[_Unread] = deque()  # oldest first; each begins behind the one before, or in front
        self._confirmed = 0  # the last receipt that was read; 0: the ring has not been opened
        self._pinned: PinnedMemory | None = None

    def pop_offer(self) -> RingOffer | None:
        """Return the offer to send with the next message, once."""
        offer, self._offer = self._offer, None
        return offer

    def write(self, tensors: Sequence[Tensor]) -> Place | None:
        """Copy tensors into the ring; return where they are, or None if the message has to carry them itself."""
        if self._file is None:
            self._open()
            return None
        self._read_receipt()
        num_bytes = sum(_aligned(tensor.nbytes) for tensor in tensors)
        start = self._find_room(num_bytes)
        if start is None or not self._allocate(start + num_bytes):
            return None
        for tensor, offset in zip(tensors, _offsets(tensors, start), strict=True):
            self._copy(tensor, offset)
        # What sends the message orders these writes before it: locks of libzmq and of the kernel.
        receipt = self._next_receipt()
        self._unread.append(_Unread(receipt, start, start + num_bytes))
        self.num_written_bytes += sum(tensor.nbytes for tensor in tensors)
        return Place(self._token, start, receipt)

    def return_memory(self) -> None:
        """Return what exceeds the memory that is kept, unless something in the ring is unread."""
        if self._file is not None and self._allocated > self._kept_end:
            self._read_receipt()
            if self._file is not None and not self._unread:
                self._shrink(self._kept_end)

    def close(self) -> None:
        """Unmap and close the file; does nothing the second time."""
        self._is_usable = False
        self._offer = None
        if self._file is not None:
            if self._pinned is not None:
                self._pinned.release()
            self._map.close()
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        """Make the file, and the offer of it, if that was not tried before."""
        if not self._is_usable:
            return
        import fcntl  # not everywhere

        self._is_usable = False
        file = None
        try:
            file = os.memfd_create("lingualinked", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(file, self._end)
            # A receiver that shortened the file would end this process when it writes there.
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
            os.posix_fallocate(file, 0, _FIRST_OFFSET)
            self._map = mmap.mmap(file, self._end)
        except OSError as error:  # no descriptor, address space or memory, or the system does not allow it
            logger.debug("no memory is shared with %r: %s", self._peer, error)
            if file is not None:
                os.close(file)
            return
        self._file, self._allocated = file, _FIRST_OFFSET
        self._token = self._map[:_TOKEN_BYTES] = secrets.token_bytes(_TOKEN_BYTES)
        # By address: an exported buffer would keep the map from being closed.
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offer = RingOffer(self._token, os.getpid(), file, self._next_receipt())
        self._unread.append(_Unread(self._offer.receipt, _FIRST_OFFSET, _FIRST_OFFSET))

    def _read_receipt(self) -> None:
        """Forget the messages that have been read."""
        receipt = self._map[_RECEIPT_OFFSET]  # may be out of date, which is safe
        if receipt == _CLOSED and self._confirmed:
            self.close()
            return
        while receipt != self._confirmed:
            if not self._unread:
                logger.warning(
                    "%r confirmed what it was not sent: no more is sent to it through shared memory", self._peer
                )
                self.close()
                return
            self._confirmed = self._unread[0].receipt  # in this order, because this may be interrupted
            self._unread.popleft()

    def _next_receipt(self) -> int:
        # From the last one that is in use, so that no interrupted message leaves a gap in them.
        last = self._unread[-1].receipt if self._unread else self._confirmed
        return last % 255 + 1

    def _find_room(self, num_bytes: int) -> int | None:
        """Return an offset with room for a message, or None if there is none."""
        if self._file is None or not self._confirmed or len(self._unread) == _MAX_UNREAD:
            return None
        if not self._unread:
            # As far in front as possible: that is in the processor's cache, and the rest may never be touched.
            self._shrink(max(self._kept_end, _FIRST_OFFSET + num_bytes))
            return _FIRST_OFFSET if _FIRST_OFFSET + num_bytes <= self._end else None
        first, last = self._unread[0].start, self._unread[-1].end
        if last <= first:
            return last if last + num_bytes <= first else None
        if last + num_bytes <= self._end:
            return last
        return _FIRST_OFFSET if _FIRST_OFFSET + num_bytes <= first else None

    def _allocate(self, end: int) -> bool:
        """Return whether the file has memory up to an offset: a write to the map would end the process where there is none."""
        while end > self._allocated:
            assert self._file is not None
            num_bytes = min(end - self._allocated, _ALLOCATED_BYTES)
            try:
                os.posix_fallocate(self._file, self._allocated, num_bytes)
            except OSError as error:
                logger.debug("no memory for %d bytes of the ring to %r: %s", end, self._peer, error)
                return False
            self._allocated += num_bytes
        return True

    def _shrink(self, end: int) -> None:
        """Return the memory behind an offset; nothing there may be unread."""
        end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        if end < self._allocated:
            with contextlib.suppress(OSError):  # it is kept then
                self._map.madvise(mmap.MADV_REMOVE, end, self._end - end)
                self._allocated = end

    def _copy(self, tensor: Tensor, offset: int) -> None:
        if not tensor.numel():
            return
        if is_plain(tensor):
            ctypes.memmove(self._address + offset, tensor.data_ptr(), tensor.nbytes)
            return
        source = tensor.detach()
        if tensor.is_cuda and offset + tensor.nbytes > self._kept_end:
            source = source.cpu()  # CUDA may refuse a copy to memory of which only a part is pinned
        elif tensor.is_cuda and self._pinned is None and self._allocate(self._kept_end):
            self._pinned = PinnedMemory(self._address, self._kept_end)
        # From the device, or from wherever the elements lie, straight into the ring; returns once all are there.
        flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        flat.view(tensor.shape).copy_(source)


class RingReader:
    """The receiver's end of one ring; tensors go to pinned memory if `is_pinned`.

    Raises ProtocolError if what a sender offers is not its ring, and OSError if it can't be opened here.
    """

    def __init__(self, offer: RingOffer, *, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned
        self._sender = f"/proc/{offer.pid}"
        self._file = _open_ring(offer)
        try:
            self._num_bytes = os.fstat(self._file).st_size
            self.release(offer.receipt)
        except BaseException:
            self.close()
            raise

    @property
    def has_sender(self) -> bool:
        """Whether the process that made the ring is there; it may have closed it."""
        return os.path.lexists(self._sender)

    def check_place(self, place: Place, sizes: Sequence[int]) -> None:
        """Raise ProtocolError if tensors of so many bytes do not fit into the ring at a place."""
        end = place.offset + sum(map(_aligned, sizes))
        if place.offset < _FIRST_OFFSET or end > self._num_bytes:
            raise ProtocolError(
                f"offsets {place.offset} to {end} are not within {_FIRST_OFFSET} to {self._num_bytes}, where a ring holds tensors"
            )

    def read(self, place: Place, tensors: Sequence[Tensor]) -> None:
        """Copy bytes at a place that has been checked into contiguous CPU tensors."""
        for tensor, offset in zip(tensors, _offsets(tensors, place.offset), strict=True):
            if tensor.numel():
                self._read(offset, memory_of(tensor))

    def release(self, receipt: int) -> None:
        """Tell the sender that it may overwrite the message with this receipt, and all before it."""
        # After the bytes were read: the kernel passes a full barrier as it drops each page that it has copied from.
        os.pwrite(self._file, bytes([receipt]), _RECEIPT_OFFSET)

    def close(self) -> None:
        """Close the file; the sender carries on without it."""
        with contextlib.suppress(OSError):  # it may not be written
            self.release(_CLOSED)
        os.close(self._file)

    def _read(self, offset: int, memory: memoryview) -> None:
        num_read = 0
        while num_read < len(memory):
            num = os.preadv(self._file, [memory[num_read:]], offset + num_read)
            if not num:
                raise ProtocolError("a ring has been shortened")
            num_read += num


def _open_ring(offer: RingOffer) -> int:
    """Open the ring that a sender offers."""
    import fcntl  # not everywhere

    # Opened without access first, which has no effect on it, whatever the sender names.
    handle = os.open(f"/proc/{offer.pid}/fd/{offer.descriptor}", os.O_PATH | os.O_CLOEXEC)
    try:
        # A file of another kind might block, or be one that the sender itself may not write.
        if not _is_in_memory(handle):
            raise ProtocolError("it is not a file in memory")
        file = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        # Whatever fills or empties a file keeps writers waiting meanwhile: its size must have an end.
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
            raise ProtocolError("its size may change")
        num_bytes = os.fstat(file).st_size
        if not _FIRST_OFFSET < num_bytes <= _FIRST_OFFSET + RING_BYTES:
            raise ProtocolError(f"it has {count_text(num_bytes, 'byte')}")
        # The token proves that both mean the same file: on another machine, the pid and the descriptor are some other file's.
        if os.pread(file, _TOKEN_BYTES, 0) != offer.token:
            raise ProtocolError("it has another token")
    except BaseException:
        os.close(file)
        raise
    return file


def _is_in_memory(file: int) -> bool:
    """Return whether a file is one that ``memfd_create`` made, without asking any other file system, which may never answer."""
    mount, device = _mount_and_device_of_memory()
    return _mount_of(file) == mount and os.fstat(file).st_dev == device


def _mount_of(file: int) -> str:
    """Return the number of the mount that a file is on; empty if this system does not tell."""
    lines = Path(f"/proc/self/fdinfo/{file}").read_text().splitlines()
    return next((line for line in lines if line.startswith("mnt_id:")), "")


@cache
def _mount_and_device_of_memory() -> tuple[str, int]:
    """Return the mount and the device of all files that ``memfd_create`` makes."""
    file = os.memfd_create("lingualinked", os.MFD_CLOEXEC)
    try:
        return _mount_of(file), os.fstat(file).st_dev
    finally:
        os.close(file)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _offsets(tensors: Sequence[Tensor], start: int) -> list[int]:
    """Return the offset of each tensor of a message that starts at a given one."""
    ends = itertools.accumulate((_aligned(tensor.nbytes) for tensor in tensors), initial=start)
    return list(itertools.islice(ends, len(tensors)))
