"""`ShardedModel.capture` and `ShardedModel.intervene`: what modules compute is collected or changed, for a ``with`` block.

Knows arguments and delegates the work; imports torch and transformers only when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import Cache

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.interventions import Intervention
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.sharded.instruments.captured import Captured
    from lingualinked.sharded.instruments.in_force import InstrumentBlock, OpenBlocks
    from lingualinked.sharded.instruments.retained import RetainingBlock


class Instrumented:
    """The part of a sharded model that captures and intervenes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _pipeline: Pipeline
        _parts: ModelParts
        _open_blocks: OpenBlocks
        named_modules: Any

    def capture(
        self,
        modules: str | Sequence[str],
        *,
        what: Literal["output", "input"] = "output",
        positions: Any = None,
        rows: Any = None,
        steps: Literal["all", "prefill", "decode"] = "all",
        dtype: torch.dtype | None = None,
        reduce: Literal["mean", "sum", "last", "norm"] | None = None,
        scope: Literal["model", "thread"] | Cache = "model",
        max_bytes: int | str = "1GiB",
        retain_grad: bool = False,
    ) -> InstrumentBlock[Captured] | RetainingBlock:
        """Collect what modules compute during the calls in a ``with`` block, chosen and reduced in the stage that computes it.

        A decode step sends no more messages than without, but one from each stage with the values. A capture does what a
        forward hook (for inputs, a pre-hook) of the module would do that is registered when the block is entered and keeps
        ``output[rows][:, positions].contiguous().to(dtype)``: of several blocks in their order, and behind the module's own hooks. Where a
        module is called with several tensors, or returns several, the first one counts.

        Parameters
        ----------
        modules : str or sequence of str
            Paths of submodules, as in ``named_modules()``; a component may be a pattern with ``*``, ``?`` or ``[0-3]``, as in
            ``"model.layers.*.mlp"``. Of those that a pattern matches, modules that are never called, such as lists, are left
            out.
        what : {"output", "input"}
            Whether to collect what a module returns, or what it is called with.
        positions : int, slice, sequence of int, or None
            Which tokens: counted from the beginning of the text, padding included; negative ones from the end of the tokens
            of each step, so that ``-1`` is the prompt's last token and then each new one. An int keeps its dimension. A
            sequence for each row, or an int64 tensor ``[rows, positions]``, chooses others in each row. ``None``: all.
        rows : int, slice, sequence of int, or None
            Which rows of the batch, as the module sees them: beam search has ``num_beams`` rows for each prompt.
        steps : {"all", "prefill", "decode"}
            In which steps: ``"prefill"`` are those with no text before them, in any KV cache; ``"decode"`` the others.
        dtype : torch.dtype or None
            A floating-point dtype to send values in; ``None``: as they are.
        reduce : {"mean", "sum", "last", "norm"} or None
            What to send of the chosen positions, computed in ``dtype``: their mean or sum, or the last one, each
            ``[rows, 1, ...]``; or the Euclidean norms over the last dimension, ``[rows, positions]``.
        scope : {"model", "thread"} or Cache
            For whose calls: all of the model; those of the thread that enters the block; or those with these
            ``past_key_values`` (this handle, not copies of it).
        max_bytes : int or str
            How much may be held, in bytes or with a unit (``"1GiB"``).
        retain_grad : bool
            Capture the tensors of the autograd graph themselves, by hooks: after ``loss.backward()`` each has its ``grad``,
            and ``torch.autograd.grad`` takes them, in a call with gradients. They are whole, and each step then waits for
            this process at each of the modules. Which text a tensor is of is not known (``sessions``).

        Returns
        -------
        context manager of Captured
            ``with`` gives a mapping: for each module the tensors of all steps that have some of the positions, in the order
            of the steps; ``[rows, positions, ...]`` each, without gradients unless ``retain_grad``. Without ``rows``, ``positions`` and ``reduce``, tensors have the
            shape that they have in the module.

        Raises
        ------
        ArgumentError
            If nothing matches, or another argument can't be used. A call in the block raises it, before anything is sent, if
            a chosen row or negative position is not in the step, or more than ``max_bytes`` would be held.
        WorkerError
            From a call in the block, if a stage sent something else than was asked for.

        Examples
        --------
        >>> with model.capture("model.layers.*.mlp", positions=-1, dtype=torch.float32) as captured:
        ...     model.generate(ids, max_new_tokens=16)
        >>> captured["model.layers.3.mlp"].cat().shape  # rows, steps, hidden
        """
        from lingualinked.sharded.instruments.making_blocks import capture_block  # imports torch

        self._pipeline.check_open()
        return capture_block(
            self,
            modules,
            what=what,
            positions=positions,
            rows=rows,
            steps=steps,
            dtype=dtype,
            reduce=reduce,
            scope=scope,
            max_bytes=max_bytes,
            retain_grad=retain_grad,
        )

    def intervene(
        self,
        interventions: Mapping[str, Intervention | Sequence[Intervention]],
        *,
        scope: Literal["model", "thread"] | Cache = "model",
    ) -> InstrumentBlock[None]:
        """Change what modules compute during the calls in a ``with`` block, in the stage that computes it.

        Interventions are data, not code: they are sent with the first step of each text, and stay in the stages until the
        block ends, also while layers move. Every one does what a forward hook (for inputs, a pre-hook) of the module would
        do that is registered when the block is entered::

            chosen = output[rows][:, positions].contiguous()
            output = output.clone()
            output[rows][:, positions] = changed(chosen)  # as an assignment by one index

        with the expression that its class states, for all values of the tensor if neither rows nor positions are chosen. Of
        several at one module each sees what those before it have made: in the order of the blocks, in a block in that of the
        mapping, and behind the module's own hooks. A `capture` sees what the blocks entered before it have changed. Where a
        module is called with several tensors, or returns several, the first one counts.

        Parameters
        ----------
        interventions : mapping of str to Intervention or a sequence of them
            By the paths of submodules, or patterns of them as in `capture`: what is done there, one after the other. The
            classes are `Add`, `Replace`, `Scale`, `Ablate`, `Project` and `Clamp`; each takes ``positions``, ``rows``,
            ``steps`` and ``what``, as `capture` does. Their tensors count as they are when the block is entered.
        scope : {"model", "thread"} or Cache
            For whose calls: all of the model; those of the thread that enters the block; or those with these
            ``past_key_values`` (this handle, not copies of it).

        Returns
        -------
        context manager
            The block; ``with`` gives nothing.

        Raises
        ------
        ArgumentError
            If nothing matches, a tensor does not fit what the module computes, or that is not floating-point. A call in the
            block raises it, before anything is sent, if a tensor does not fit the rows and positions of a step, or a chosen
            row or negative position is not in it; the end of the block, if a chosen position was in none of its steps.
        UnsupportedOperationError
            If every stage runs the module for itself, such as what computes rotary embeddings: hook it instead. From a call in
            the block that may have gradients, if a tensor of an intervention requires them.

        Notes
        -----
        Recorded ``hidden_states`` contain what interventions have made of a layer's output. Those of the uncut model do not
        contain what a hook made that was registered after its first call that recorded them, as transformers' own hooks then
        run before it; a `capture` in an outer block has the values before.

        Examples
        --------
        >>> with model.intervene({"model.layers.5": ll.Add(vector), "model.layers.*.mlp": ll.Scale(0.5, positions=-1)}):
        ...     model.generate(ids, max_new_tokens=16)
        """
        from lingualinked.sharded.instruments.making_blocks import intervention_block  # imports torch

        self._pipeline.check_open()
        return intervention_block(self, interventions, scope=scope)
