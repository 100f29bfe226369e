"""Decode steps of a stage, captured once as CUDA graphs and replayed: one launch in place of some hundred.

A graph is trusted once it has given the bits of the eager step twice. Knows one stage's forward pass and static KV caches.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.length_probe import AttentionShape, is_length_free

if TYPE_CHECKING:
    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.process.torch_settings import TorchSettings

logger = logging.getLogger("lingualinked.model")

_NUM_TRIALS = 2  # steps of which a graph has to give the eager bits: at the second one, a constant in it would show
_MAX_GRAPHS = 16  # of one cache; its steps differ in length, in settings and in the logits that they keep
# Captures that raise: what can't be captured mostly can't in any length, and torch frees no memory of it.
_MAX_FAILURES = 16
_SHORTEST = 256  # tokens; graphs read as many tokens of KV as this, twice as many, and so on

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function does on the device, without doing it, and returns a function that does it."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The inputs of a step of one token for each row."""

    states: Tensor  # token ids [rows, 1] int64, or hidden states [rows, 1, hidden]
    # [rows, past + 1]; in a graph wider, or by type of layers, [rows, 1, 1, tokens].
    mask: Tensor | dict[str, Tensor] | None
    positions: Tensor | None  # [1 or rows, 1] int64

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes and dtypes, apart from the length of the text."""
        mask = (self.mask.dtype, self.mask.shape[0]) if isinstance(self.mask, Tensor) else None
        positions = None if self.positions is None else (self.positions.dtype, self.positions.shape)
        return self.states.dtype, self.states.shape, mask, positions


Forward = Callable[[DecodeInputs], tuple[Tensor, ...]]
"""A step of the stage, which adds to the KV cache and counts the token on the device, and returns its outputs there."""

MakeMasks = Callable[[DecodeInputs], dict[str, Tensor]]
"""Makes the masks of a step on the device, by type of layers, where a graph can't make them."""


class CudaRecorder:
    """Captures CUDA graphs, whose working memory is shared: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # each of them keeps the memory that they share

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        """Capture what `body` launches; raise what torch raises if it can't be captured, such as a wait for the device."""
        graph: Any = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        stream = _capture_stream(self._device)
        stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()  # freeing a graph or a tensor of another stream would end the capture
        try:
            with torch.cuda.stream(stream):
                # Only this thread's calls count: another one may be loading a stage.
                pool = [each.pool() for each in self._graphs][:1]
                graph.capture_begin(*pool, capture_error_mode="thread_local")
                try:
                    body()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        current.wait_stream(stream)
        self._graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """Return the stream of all captures: with each further one, libraries would allocate workspaces that they keep."""
    return torch.cuda.Stream(device)


class StepGraph:
    """One kind of decode step on one KV cache, with its inputs and outputs at fixed places.

    The mask of a step is made in the graph. With sliding windows, whose masks depend on numbers of the host, it is made before.
    Nothing here refers to the cache, which owns the graph: both are freed with the last reference to the cache.
    """

    def __init__(
        self,
        kind: Any,
        visible: int | None,
        forward: Forward,
        make_masks: MakeMasks,
        cache: StageCache,
        inputs: DecodeInputs,
        device: torch.device,
    ) -> None:
        self.kind = kind
        self.layout: tuple[bool, ...] | None = None  # of its outputs
        self._cache = weakref.ref(cache)
        self._visible = visible
        self._forward, self._make_masks, self._device = forward, make_masks, device
        self._num_seen = 0
        self._num_equal = 0
        self._replay: Callable[[], None] | None = None
        on_cuda = device.type == "cuda"
        # What the next step needs: on the host, then on the device, where graphs read it.
        self._staged = [each.to("cpu", copy=True) for each in (inputs.states, inputs.positions) if each is not None]
        if on_cuda:
            self._staged = [each.pin_memory() for each in self._staged]
        self._held = [each.to(device) for each in self._staged]
        self._held_masks: dict[str, Tensor] = {}  # made before the graph runs
        self._column: Tensor | None = None  # of the mask, for the new token
        self._seen_mask: Tensor | None = None  # on the host, as of the last step
        if isinstance(inputs.mask, Tensor) and not cache.windows:
            rows = inputs.mask.shape[0]
            self._column = torch.ones((rows, 1), dtype=inputs.mask.dtype, pin_memory=on_cuda)
            self._held_column = self._column.to(device)
            self._held_mask = torch.zeros((rows, cache.max_cache_len), dtype=inputs.mask.dtype, device=device)
        self._outputs: tuple[Tensor, ...] = ()
        self._before: list[Tensor] = []  # what the windows held before a trial

    @property
    def cache(self) -> StageCache:
        """The KV cache that it works on."""
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def is_trusted(self) -> bool:
        """Whether it has given the bits of the eager step often enough."""
        return self._num_equal >= _NUM_TRIALS

    def run(self, inputs: DecodeInputs) -> tuple[Tensor, ...]:
        """Run a step; return its outputs on the host, valid until the next one."""
        assert self._replay is not None
        # 1) put the inputs in their places
        given = [each for each in (inputs.states, inputs.positions) if each is not None]
        for place, value in zip(self._staged, given, strict=True):
            place.copy_(value)
        self._place_mask(inputs)
        # 2) replay, and wait for the outputs
        self._replay()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self._outputs

    def begin_trial(self) -> None:
        """Keep what the eager step is about to change in the windows, so that it can be repeated."""
        self._before = [each.clone() for each in self.cache.window_tensors()] if self._num_seen else []

    def end_trial(self, inputs: DecodeInputs, eager: tuple[Tensor, ...], record: Recorder) -> bool:
        """Repeat the eager step that has just been run, as a graph; return whether outputs and KV have the same bits.

        The KV is that of the eager step afterwards. The first step is not repeated: kernels are loaded and chosen there.
        """
        self._num_seen += 1
        if self._num_seen == 1:
            return True
        # 1) put everything back to where it was before the eager step
        cache, windows = self.cache, self.cache.window_tensors()
        written = cache.new_tokens() + windows
        after = [each.clone() for each in written]
        for place, value in zip(windows, self._before, strict=True):
            place.copy_(value)
        for place in cache.new_tokens():
            place.zero_()
        self._before.clear()
        try:
            # 2) capture the step, and run it
            cache.forget_step()
            if self._replay is None:
                self._outputs = tuple(torch.empty_like(each, device="cpu") for each in eager)
                if self._device.type == "cuda":
                    self._outputs = tuple(each.pin_memory() for each in self._outputs)
                self._hold_masks(inputs)
                self._replay = record(self._launch)
                cache.forget_step()
            outputs = self.run(inputs)
            # 3) compare
            is_equal = (
                all(map(have_equal_bits, outputs, (each.cpu() for each in eager)))
                and all(map(have_equal_bits, written, after))
                and int(cache.count.on_device) == cache.num_tokens + 1
            )
        finally:
            for place, value in zip(written, after, strict=True):
                place.copy_(value)
            cache.count.on_device.fill_(cache.num_tokens + 1)
        self._num_equal += is_equal
        return is_equal

    def _place_mask(self, inputs: DecodeInputs) -> None:
        """Put the mask in its place: only the new column, unless another text has begun; or all that can't be made there."""
        if self.cache.windows:
            for name, made in self._masks(inputs).items():
                self._held_masks[name].copy_(made)
        elif self._column is not None:
            mask = inputs.mask
            assert isinstance(mask, Tensor)
            self._column.copy_(mask[:, -1:])
            if self._seen_mask is None or not torch.equal(self._seen_mask, mask[:, :-1]):
                self._held_mask.zero_()
                self._held_mask[:, : mask.shape[1] - 1].copy_(mask[:, :-1])
            self._seen_mask = mask

    def _hold_masks(self, inputs: DecodeInputs) -> None:
        if self.cache.windows:
            self._held_masks = {name: made.contiguous() for name, made in self._masks(inputs).items()}

    def _masks(self, inputs: DecodeInputs) -> dict[str, Tensor]:
        with self._reading_part():
            return self._make_masks(inputs)

    @contextlib.contextmanager
    def _reading_part(self) -> Iterator[None]:
        """Let full attention read as much of the KV as this graph does."""
        self.cache.count.visible = self._visible
        try:
            yield
        finally:
            self.cache.count.visible = None

    def _launch(self) -> None:
        """Do what a step does on the device, from the staged inputs to the outputs on the host."""
        for place, value in zip(self._held, self._staged, strict=True):
            place.copy_(value, non_blocking=True)
        mask: Tensor | dict[str, Tensor] | None = None
        if self._held_masks:
            mask = self._held_masks.get("", self._held_masks)
        elif self._column is not None:
            self._held_column.copy_(self._column, non_blocking=True)
            mask = self._held_mask
            mask.index_copy_(1, self.cache.count.on_device.view(1), self._held_column)
        states, positions = self._held[0], self._held[1] if len(self._held) > 1 else None
        with self._reading_part():
            outputs = self._forward(DecodeInputs(states, mask, positions))
        for place, value in zip(self._outputs, outputs, strict=True):
            place.copy_(value, non_blocking=True)


@dataclass(slots=True)
class StepGraphs:
    """The graphs of a stage's decode steps, on all its static KV caches."""

    device: torch.device
    record: Recorder | None  # None: the device has no graphs
    num_heads: int = 0  # of queries, if attention is torch's; 0: it is another one
    refusals: dict[Any, str] = field(default_factory=dict)  # why steps of a kind can't be replayed
    num_failures: int = 0
    num_replayed: int = 0
    idle: list[StageCache] = field(default_factory=list)  # of sessions that have ended, for others of the same shape

    def serve(self, cache: StageCache) -> bool:
        """Return whether steps that continue a text in this KV cache may be captured."""
        return self.record is not None and cache.is_static and cache.num_tokens > 0

    def find(
        self,
        inputs: DecodeInputs,
        constants: Any,
        settings: TorchSettings,
        forward: Forward,
        make_masks: MakeMasks,
        cache: StageCache,
    ) -> StepGraph | None:
        """Return the graph of a kind of step, which may be still to be captured or on trial; None if there can be none.

        Besides its inputs, `constants` and torch's settings determine what a step does. A graph reads no more KV than it has
        to, if that gives the same bits.
        """
        set_values = tuple(sorted(settings.items()))
        for visible in (self._length_to_read(cache, set_values), None):
            kind = (inputs.shapes, constants, set_values, cache.max_cache_len, tuple(cache.windows.items()), visible)
            graph: StepGraph | None = cache.captured.get(kind)
            is_known = kind in cache.captured or kind in self.refusals
            is_new = not is_known and len(cache.captured) < _MAX_GRAPHS and self.num_failures < _MAX_FAILURES
            try:
                if is_new:
                    graph = StepGraph(kind, visible, forward, make_masks, cache, inputs, self.device)
                if graph is not None and not graph.is_trusted:
                    graph.begin_trial()
            except RuntimeError as error:
                self._give_up(cache, kind, error)
                continue
            if graph is not None:
                cache.captured[kind] = graph
                return graph
        return None

    def end_trial(self, graph: StepGraph, inputs: DecodeInputs, eager: tuple[Tensor, ...]) -> None:
        """Let a graph repeat an eager step; steps of its kind stay eager if it can't, or gives other bits."""
        assert self.record is not None
        try:
            if graph.end_trial(inputs, eager, self.record):
                return
            self._give_up(graph.cache, graph.kind, "it gives other bits than the eager step")
        except Exception as error:  # noqa: BLE001 - the eager step has succeeded, and its KV is there again
            self._give_up(graph.cache, graph.kind, error)

    def _give_up(self, cache: StageCache, kind: Any, why: str | Exception) -> None:
        """Leave steps of a kind eager: with all caches, or, if memory is short, with this one until it is used again."""
        reason = why if isinstance(why, str) else str(why).partition("\n")[0] or type(why).__name__
        if isinstance(why, MemoryError | torch.OutOfMemoryError) or "out of memory" in reason:
            cache.captured[kind] = None
        else:
            cache.captured.pop(kind, None)
            self.refusals[kind] = reason
            self.num_failures += isinstance(why, Exception)
        logger.info("decode steps of a kind stay eager, since they can't be replayed as a graph: %s", reason)

    def keep(self, cache: StageCache, max_tokens: float) -> None:
        """Keep the cache of a session that has ended, if it has graphs, while all idle ones have at most `max_tokens`."""
        if any(cache.captured.values()) and cache.size + sum(each.size for each in self.idle) <= max_tokens:
            self.idle.append(cache)

    def reuse(self, num_rows: int, max_cache_len: int) -> StageCache | None:
        """Return an idle cache of a shape, emptied, with its graphs; None if there is none."""
        for index, cache in enumerate(self.idle):
            if (cache.num_rows, cache.max_cache_len) == (num_rows, max_cache_len):
                del self.idle[index]
                cache.clear()
                return cache
        return None

    def _length_to_read(self, cache: StageCache, settings: tuple[tuple[str, bool | int | str], ...]) -> int | None:
        """Return how many tokens of KV the next step has to read, if that gives the same bits as all; else None."""
        length = _SHORTEST
        while length <= cache.num_tokens:
            length *= 2
        if not self.num_heads or length >= cache.max_cache_len:
            return None
        shapes = {
            AttentionShape(
                keys.dtype, keys.device, len(keys), self.num_heads, keys.shape[1], keys.shape[3], values.shape[3]
            )
            for keys, values in cache.full_layers()
        }
        is_free = all(is_length_free(shape, length, cache.max_cache_len, settings) for shape in shapes)
        return length if is_free else None
