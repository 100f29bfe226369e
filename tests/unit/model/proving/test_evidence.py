"""A model type that no test has proven is tried once; what differs is refused by name, before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from architectures import spec_of_config
from lingualinked.errors import UncuttableModelError
from lingualinked.model.proving import evidence
from lingualinked.model.proving.evidence import Proven, check_exact, is_proven
from lingualinked.model.proving.trial import InStages, Trial, try_cutting

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=4, vocab_size=600)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lingualinked"


@pytest.fixture
def nothing_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_proven", lambda: Proven("0", ()))


def never(*_: Any) -> Trial:
    raise AssertionError("tried")


def check(config: PreTrainedConfig = CONFIG) -> None:
    check_exact(config, spec_of_config(config, "float32"))


def test_what_a_test_has_proven_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "try_cutting", never)
    check()
    assert not is_proven("llama", "LlamaForSequenceClassification")


def test_what_no_test_has_proven_is_tried_once(
    nothing_proven: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lingualinked.model"):
        check()
    assert "LlamaForCausalLM is proven here" in caplog.text
    monkeypatch.setattr(evidence, "try_cutting", never)
    check()
    with pytest.raises(AssertionError, match="tried"):  # another kind of model
        check(LlamaConfig(hidden_size=64, num_attention_heads=4, attention_bias=True))


def test_what_differs_is_refused_with_what_differed(nothing_proven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = InStages.step

    def step_badly(self: InStages, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = step(self, tokens, mask)
        return logits + 1e-3 if len(self.stages) == 3 and tokens.shape[1] > 10 else logits

    monkeypatch.setattr(InStages, "step", step_badly)
    for _ in range(2):  # the second time it is read
        with pytest.raises(UncuttableModelError, match=r"not exact .* in 3 stages, decoding differs by up to 0.001"):
            check()


def test_a_trial_does_not_change_torchs_random_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert not try_cutting(CONFIG, spec_of_config(CONFIG, "float32")).difference
    assert torch.equal(torch.rand(1), expected)


def test_an_error_in_stages_is_what_differed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such state")

    monkeypatch.setattr(InStages, "move", fail)
    trial = try_cutting(CONFIG, spec_of_config(CONFIG, "bfloat16"))
    assert trial.difference == "RuntimeError: no such state"


def test_where_nothing_can_be_kept_it_is_tried_again(
    nothing_proven: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    cache.write_text("no folder")
    tried: list[int] = []

    def try_anew(*arguments: Any) -> Trial:
        tried.append(1)
        return Trial(exact=("prefill",))

    monkeypatch.setattr(evidence, "try_cutting", try_anew)
    check()
    check()
    assert len(tried) == 2


def test_an_error_is_not_kept(nothing_proven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is short once does not refuse a model for ever."""

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(InStages, "move", fail)
        with pytest.raises(UncuttableModelError, match="MemoryError"):
            check()
    check()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"null", b'{"exact":1}', b'{"a":' * 100_000, b"[" * 100_000],
    ids=lambda content: repr(content[:9]),
)
def test_a_file_that_is_no_trial_is_made_anew(
    nothing_proven: None, monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes
) -> None:
    monkeypatch.setattr(evidence, "try_cutting", lambda *_: Trial(exact=("prefill",)))
    check()
    (file,) = cache.glob("trial-*")
    expected = file.read_bytes()
    file.write_bytes(content)
    check()
    assert file.read_bytes() == expected
