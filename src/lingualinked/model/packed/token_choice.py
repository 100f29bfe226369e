"""How the next token of one text is chosen from its logits. Plain data, as it is sent.

Knows neither logits nor how a choice is made.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from lingualinked.model.sampling.processor_data import ProcessorSpec


class TokenChoice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How to choose the next token of one text.

    Parameters
    ----------
    processors : tuple of ProcessorSpec
        The logits processors, which `choosing.describe_choice` has described.
    seed : int or None
        The token is drawn by a generator with this seed, so that it does not depend on other texts; ``None``: the
        likeliest one is chosen.
    returns_logits : bool
        Whether the logits come back too, as the model computes them.
    returns_logprob : bool
        Whether the logarithm of the token's probability, of the processed scores, comes back too.
    """

    processors: tuple[ProcessorSpec, ...] = ()
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    returns_logits: bool = False
    returns_logprob: bool = False
