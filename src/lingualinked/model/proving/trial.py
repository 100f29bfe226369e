"""Tries whether a model of some configuration is exact when cut: a small copy of it, uncut and in stages, bit for bit.

Knows stages in this process; nothing of workers, and of no architecture by name.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.model.hf_internals.cache_arguments import cache_argument
from lingualinked.model.proving.small_model import (
    SmallModel,
    Uncut,
    forward_arguments,
    make_small_model,
    positions_of,
    prompt,
)
from lingualinked.model.stages.chaining import run_chained
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.spec import ModelSpec

Steps = list[tuple[Tensor, Tensor, Tensor]]
"""Of a conversation with the uncut model: all tokens so far, their padding mask, and the logits of the new ones."""

_NUM_PROMPT, _NUM_PADDED, _NUM_CONTINUED = 9, 4, 3
_LENGTHS = (1, 1, 1, 1, _NUM_CONTINUED, 1)  # of the steps after the prompt

Cut = tuple[int, ...]
"""The layers at which stages begin, and the number of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial has shown.

    Parameters
    ----------
    exact : tuple of str
        The modes in which every cut was equal to the uncut model: ``"prefill"``, ``"decode"``, ``"continue"``, ``"padded"``,
        ``"moved"``.
    difference : str
        What differed first, or the error; empty if nothing did.
    raised : bool
        Whether that is an error, whose cause may be this machine at that moment: memory or disk that is full.
    """

    exact: tuple[str, ...]
    difference: str = ""
    raised: bool = False


class InStages:
    """A conversation with stages in this process, chained; only their outputs reach others."""

    def __init__(self, model: SmallModel, stages: Sequence[Stage]) -> None:
        cls = type(model.whole)
        self._spec, self.stages = model.spec, list(stages)
        self._has_positions = "position_ids" in forward_arguments(cls)
        self._caches: list[StageCache | None] = [
            each.new_cache() if cache_argument(cls) else None for each in self.stages
        ]
        self._num_seen = 0

    def step(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of the new tokens, the last ones of `tokens` [rows, all tokens so far]."""
        past = self._num_seen if self._caches[0] is not None else 0
        inputs = StageInputs(
            tensors=(tokens[:, past:],),
            layout=None,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, past:] if self._has_positions else None,
        )
        (logits,) = run_chained(self.stages, self._caches, inputs)
        self._num_seen = tokens.shape[1]
        return logits

    def move(self, cut: Cut) -> None:
        """Cut elsewhere; layers and what they keep are handed over."""
        stages = [
            Stage.load(
                self._spec, start, end, shared=[each for each in self.stages if each.start < end and start < each.end]
            )
            for start, end in itertools.pairwise(cut)
        ]
        caches: list[StageCache | None] = []
        # Some layers may not have been called at all, such as those that attend to a picture that is not there.
        lags = {slot: lag for each in self._caches if each is not None for slot, lag in each.lags.items()}
        for stage in stages:
            cache = None
            if self._caches[0] is not None:
                cache = stage.new_cache()
                cache.adopt_layers([each for each in self._caches if each is not None])
                cache.complete_adoption(
                    self._num_seen,
                    records_past=False,
                    lags={slot: lag for slot, lag in lags.items() if slot in cache.owned},
                )
            caches.append(cache)
        self.stages, self._caches = stages, caches


def try_cutting(
    config: PreTrainedConfig,
    spec: ModelSpec,
    *,
    per_layer: bool = False,
    watch: Callable[[SmallModel, list[Stage]], None] | None = None,
) -> Trial:
    """Compare a small copy of a model, in 2 and 3 stages, with the same copy uncut.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model, of any size.
    spec : ModelSpec
        Of the model: its class, dtype and attention implementation; no file of it is read.
    per_layer : bool, optional
        Whether to cut between all layers as well.
    watch : callable, optional
        Called with the small model and the stages of each cut.

    Returns
    -------
    Trial

    Raises
    ------
    UncuttableModelError
        If transformers itself can't run a small copy.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):  # loading draws numbers
        small = make_small_model(config, spec, Path(folder))
        return _compare(small, per_layer=per_layer, watch=watch or (lambda *_: None))


def _compare(model: SmallModel, *, per_layer: bool, watch: Callable[[SmallModel, list[Stage]], None]) -> Trial:
    padded = torch.ones(2, _NUM_PROMPT, dtype=torch.long)
    padded[0, :_NUM_PADDED] = 0
    said = {"one": _conversation(model, padded[1:], _LENGTHS), "padded": _conversation(model, padded, _LENGTHS[:3])}
    exact = {
        "prefill": True,
        "decode": len(said["one"]) > _LENGTHS.index(_NUM_CONTINUED),
        "continue": len(said["one"]) > len(_LENGTHS),
        "padded": len(said["padded"]) > 1,
    }
    try:
        whole = Stage.load(model.spec, 0, 1)  # which finds the number of layers
        num_layers, forbidden = whole.num_layers, set(whole.span.parts.transmission.forbidden_cuts)
        cuts = _cuts(num_layers, forbidden, per_layer=per_layer)
        for cut in cuts:
            stages = [Stage.load(model.spec, start, end) for start, end in itertools.pairwise(cut)]
            watch(model, stages)
            for conversation, steps in said.items():
                found = _first_difference(InStages(model, stages), steps)
                if found is not None:
                    number, how = found
                    where = f"in {count_text(len(stages), 'stage')}, {_mode(conversation, number)} {how}"
                    return Trial(exact=(), difference=where)
        for before, after in itertools.pairwise((*cuts, cuts[0])):
            moved = InStages(model, [Stage.load(model.spec, *span) for span in itertools.pairwise(before)])
            found = _first_difference(moved, said["one"], {3: after, 5: before})
            if found is not None:
                how = f"after layers moved, {_mode('one', found[0])} {found[1]}"
                return Trial(exact=tuple(name for name, is_exact in exact.items() if is_exact), difference=how)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        return Trial(exact=(), difference=f"{type(error).__name__}: {error}", raised=True)
    return Trial(exact=(*(name for name, is_exact in exact.items() if is_exact), "moved"))


def _cuts(num_layers: int, forbidden: set[int], *, per_layer: bool) -> list[Cut]:
    """Return cuts into 2 and 3 stages, where they are allowed, and into as many as are."""
    allowed = [layer for layer in range(1, num_layers) if layer not in forbidden]
    inner = [tuple(allowed[len(allowed) // 2 :][:1])]
    if len(allowed) > 1:
        inner.append((allowed[len(allowed) // 3], allowed[min(len(allowed) - 1, max(1, 2 * len(allowed) // 3))]))
    if per_layer and len(allowed) > 2:
        inner.append(tuple(allowed))
    return [(0, *each, num_layers) for each in dict.fromkeys(inner)]


def _mode(conversation: str, number: int) -> str:
    """Name what a step of a conversation is."""
    if conversation == "padded":
        return "a left-padded batch" if number == 0 else "decoding of a left-padded batch"
    if number == 0:
        return "prefill"
    return "decoding" if _LENGTHS[number - 1] == 1 else "a continuation by several tokens"


def _first_difference(cut: InStages, steps: Steps, moves: dict[int, Cut] | None = None) -> tuple[int, str] | None:
    """Return the first step of a conversation whose logits are not those of the uncut model, and how they differ."""
    for number, (tokens, mask, theirs) in enumerate(steps):
        if moves and number in moves:
            cut.move(moves[number])
        ours = cut.step(tokens, mask)
        if not _are_same(ours, theirs):
            if ours.shape != theirs.shape:
                return number, f"gives logits {list(ours.shape)}, not {list(theirs.shape)}"
            return number, f"differs by up to {(ours.float() - theirs.float()).abs().max().item():.2g}"
    return None


def _are_same(ours: Tensor, theirs: Tensor) -> bool:
    """Compare logits bit for bit; those of padding may be NaN in both."""
    return torch.equal(ours, theirs) or (
        ours.shape == theirs.shape
        and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        and torch.equal(ours.isnan(), theirs.isnan())
    )


def _conversation(model: SmallModel, mask: Tensor, lengths: Sequence[int]) -> Steps:
    """Return the steps of a conversation with the uncut model: a prompt with a padding mask, and so many tokens each.

    It ends where transformers itself fails.
    """
    uncut, tokens = Uncut(model.whole), prompt(len(mask), mask.shape[1], model.vocabulary)
    steps: Steps = [(tokens, mask, uncut.step(tokens, mask))]
    with contextlib.suppress(Exception):
        for length in lengths:
            new = torch.cat(
                [steps[-1][2][:, -1:].argmax(-1), prompt(len(mask), length, model.vocabulary)[:, 1:]], dim=1
            )
            tokens, mask = torch.cat([tokens, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
            steps.append((tokens, mask, uncut.step(tokens, mask)))
    return steps
