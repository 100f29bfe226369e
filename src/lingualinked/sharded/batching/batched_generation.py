"""Continuous batching of a sharded model, with the methods and signatures of transformers' ``ContinuousMixin``.

Knows transformers' entry points and the manager; neither scheduling nor steps.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching.utils import WorkloadHints

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interrupts import interruptible
from lingualinked.sharded.batching.manager import ShardedBatchingManager
from lingualinked.sharded.batching.qualifying import check_ends, read_prompts
from lingualinked.sharded.batching.settings import check_classes

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput

_makes_manager: contextvars.ContextVar[bool] = contextvars.ContextVar("makes_manager", default=False)
_WITHOUT = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer")


class BatchedGeneration:
    """Mixin with continuous batching; comes before transformers' ``GenerationMixin`` in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        generation_config: Any

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> ShardedBatchingManager:
        """Return a manager of continuous batching, which serves requests once it is started.

        Parameters
        ----------
        generation_config : GenerationConfig or None
            ``None``: the model's. Of it count ``max_new_tokens``, ``eos_token_id``, ``num_return_sequences``, ``do_sample`` and the
            logits processors that transformers supports in continuous batching; what else would change tokens is refused.
        continuous_batching_config : ContinuousBatchingConfig or None
            As in transformers. What has no counterpart here is refused by name.
        workload_hints : WorkloadHints or None
            As in transformers.

        Returns
        -------
        ContinuousBatchingManager
            Transformers' manager, for this model: the one that was kept by ``stop(keep_for_next_session=True)``, if there is one, and
            it was made with the configs given here; a config of ``None`` fits any.

        Raises
        ------
        UnsupportedOperationError
            If packed steps can't run the model, or a setting, a hook, a capture, an intervention or an adapter asks for what they
            can't do.
        ArgumentError
            If a setting is out of range.
        ClosedError
            If the model is closed.
        """
        check_classes(generation_config, continuous_batching_config)
        kept = vars(self).get("_cached_continuous_batching_manager")
        if isinstance(kept, ShardedBatchingManager) and kept.was_made_with(
            generation_config, continuous_batching_config
        ):
            return kept
        generation = self.generation_config if generation_config is None else generation_config
        if generation.eos_token_id is None:
            generation.eos_token_id = -1  # as transformers does
        config = continuous_batching_config or getattr(generation, "continuous_batching_config", None)
        token = _makes_manager.set(True)
        try:
            return ShardedBatchingManager(self, generation, config or ContinuousBatchingConfig(), workload_hints)
        finally:
            _makes_manager.reset(token)

    @contextlib.contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: WorkloadHints | None = None,
    ) -> Iterator[ShardedBatchingManager]:
        """Start a manager for a ``with`` block; at its end, wait for all requests, or end them at once after an interrupt.

        Parameters
        ----------
        generation_config, continuous_batching_config, workload_hints
            As in `init_continuous_batching`.
        block : bool
            Whether to wait at the end.
        timeout : float or None
            For how many seconds at most; ``None``: until all requests have ended.
        persistent_manager : bool
            Whether to keep the manager for later calls with the same configs, or without any.
        warmup : bool
            Without effect: there is nothing to warm up.

        Yields
        ------
        ContinuousBatchingManager
            The manager.

        Raises
        ------
        UnsupportedOperationError, ArgumentError, ClosedError
            As `init_continuous_batching`.
        """
        manager = self.init_continuous_batching(generation_config, continuous_batching_config, workload_hints)
        if warmup and not manager.warmed_up:
            manager.warmup()
        try:
            try:
                manager.start()
                yield manager
            except Exception:
                manager.stop(block=block, timeout=timeout)
                raise
            manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent_manager)
        except Exception:
            raise
        except BaseException:  # nothing is left behind an interrupt, also of the wait for the requests
            manager.stop(block=True, timeout=timeout, hard_stop=True)
            raise
        if not persistent_manager:
            manager.destroy()

    @interruptible
    def generate_batch(
        self,
        inputs: Iterable[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Continue many prompts at once, of any lengths: each joins the batch when there is room, and leaves it when it ends.

        Parameters
        ----------
        inputs : iterable of sequences of int
            The token ids of each prompt, without padding.
        generation_config, continuous_batching_config
            As in `init_continuous_batching`.
        record_timestamps : bool
            Whether outputs say when each token came.
        progress_bar : bool
            Whether to show how many have ended.
        persistent_manager, warmup
            As in `continuous_batching_context_manager`.
        **kwargs
            ``max_new_tokens``: otherwise as the generation config says; without any, until the end-of-sequence token.

        Returns
        -------
        dict of str to GenerationOutput
            By request id, in the order of the prompts. One that could not be served has the status FAILED, and says why in ``error``.

        Raises
        ------
        UnsupportedOperationError, ClosedError
            As `init_continuous_batching`.
        ArgumentError
            If a prompt is empty, has ids outside the vocabulary, or exceeds the learned positions; no request has begun then. If
            ``max_length`` is set without ``max_new_tokens``, nothing ends the texts, or another argument is given.
        """
        given = kwargs.pop("max_new_tokens", None)
        if kwargs:
            raise ArgumentError(
                f"unknown argument {min(kwargs)!r} of generate_batch: settings go into generation_config="
            )
        check_classes(generation_config, continuous_batching_config)
        generation = self.generation_config if generation_config is None else generation_config
        prompts = read_prompts(inputs, given)
        if not prompts:
            return {}
        limit = generation.max_new_tokens if given is None else given
        num_each = generation.num_return_sequences or 1
        hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)),
            max_generated_length=limit or 0,
            num_requests=len(prompts) * num_each,
        )
        results: dict[str, GenerationOutput] = {}
        with (
            self.continuous_batching_context_manager(
                generation_config,
                True,
                None,
                continuous_batching_config,
                persistent_manager=persistent_manager,
                warmup=warmup,
                workload_hints=hints,
            ) as manager,
            tqdm(total=hints.num_requests, disable=not progress_bar, unit="request") as bar,
        ):
            check_ends(self, manager.generation_config, limit)
            request_ids = manager.add_requests(prompts, max_new_tokens=limit, record_timestamps=record_timestamps)
            while len(results) < hints.num_requests:
                output = manager.get_result()
                if output is None:
                    break  # the manager has failed, and all outputs are there
                if output.is_finished():
                    results[output.request_id] = output
                    bar.update()
        names = [[*(f"{each}__child#{index}" for index in range(num_each - 1)), each] for each in request_ids]
        return {name: results[name] for group in names for name in group if name in results}

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' own manager, which calls this without arguments before it runs layers itself."""
        if not args and not kwargs and not _makes_manager.get():
            raise UnsupportedOperationError(
                "a ContinuousBatchingManager of transformers runs layers in this process: call init_continuous_batching of the model"
            )
        return super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _generate_paged(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do what transformers does for ``generate(cache_implementation="paged")``: continue the rows by `generate_batch`."""
        given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs)
        arguments = given.arguments.pop("kwargs", {})
        arguments = {name: value for name, value in arguments.items() if name != "cache_implementation"}
        inputs, ids = given.arguments.get("inputs"), arguments.pop("input_ids", None)
        for name in (*_WITHOUT, "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"):
            if given.arguments.get(name) is not None:
                raise UnsupportedOperationError(
                    f"{name} is not supported by continuous batching: call generate without "
                    'cache_implementation="paged"'
                )
        mask = arguments.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()):
            raise UnsupportedOperationError(
                "continuous batching takes texts without padding: pass each to generate_batch"
            )
        ids = ids if inputs is None else inputs
        if not isinstance(ids, Tensor) or ids.ndim not in (1, 2):
            raise ArgumentError("generate with cache_implementation='paged' needs input_ids of one or two dimensions")
        settings = given.arguments.get("generation_config")
        named = (each.max_length for each in (settings, self.generation_config) if each is not None)
        has_max_length = any(length is not None for length in (arguments.get("max_length"), *named))
        config, model_kwargs = self._prepare_generation_config(settings, **arguments)  # type: ignore[attr-defined]
        if not has_max_length:
            config.max_length = None  # transformers' default of 20, which its own continuous batching does not use
        self._validate_model_kwargs(model_kwargs)  # type: ignore[attr-defined]
        if (config.num_return_sequences or 1) != 1:
            raise UnsupportedOperationError(
                "num_return_sequences with cache_implementation='paged': call generate_batch"
            )
        outputs = self.generate_batch(ids.reshape(-1, ids.shape[-1]).tolist(), config)
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed:
            raise ArgumentError(failed[0])
        texts = [output.prompt_ids + output.generated_tokens for output in outputs.values()]
        if len(set(map(len, texts))) > 1:
            raise UnsupportedOperationError(
                f"texts of different lengths ({', '.join(str(len(each)) for each in texts)}) make no tensor, in transformers neither: "
                "call generate_batch"
            )
        return torch.tensor(texts, dtype=torch.long)[None]
