"""A small copy of every decoder-only model type is exact when cut anywhere: a fifth of the types, or all of them."""

from __future__ import annotations

import pytest

from architectures import NEEDED, decoder_only_types, default_config, find_row, spec_of_config
from lingualinked.model.proving.trial import try_cutting

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of models that nobody else loads

# Types that are refused, or differ, with the reason; "xlnet" can't be run by transformers itself in bfloat16.
NOT_EXACT = {"minimax": "a cache of its own", "reformer": "two streams"}
NOT_RUN = {("xlnet", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("every_type", decoder_only_types())
def test_cut_anywhere_is_exact(every_type: str, dtype: str) -> None:
    if every_type in NOT_EXACT or (every_type, dtype) in NOT_RUN:
        assert find_row(every_type, dtype).difference
        return
    config = default_config(every_type)
    trial = try_cutting(config, spec_of_config(config, dtype), per_layer=True)
    assert not trial.difference
    assert "prefill" in trial.exact


def test_there_are_types_for_what_defaults_lack() -> None:
    assert set(NEEDED) <= set(decoder_only_types())
