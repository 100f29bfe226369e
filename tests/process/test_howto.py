"""The code of the how-to pages runs as it stands, page by page, and each page leaves the model as it found it.

A line that ends in ``# True`` or ``# False`` is what it says. `docs/howto/pytest.md` is run by test_plugin.py,
`docs/howto/batch_invariance.md` by test_batch_invariance.py, `docs/howto/ray.md` by `make test-ray`; what the pages on other
schedulers run is in deploy/.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config` attribute"
    ),  # of transformers, at a second adapter
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True."),  # of peft
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # of peft
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # of peft
]

PAGES = Path(__file__).parents[2] / "docs" / "howto"
OTHERS = ("index", "batch_invariance", "pytest", "ray", "slurm", "kubernetes")
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem not in OTHERS)
IDS = torch.tensor([[1, 17, 93, 54, 8]])


def code_of(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    return re.sub(
        r"^( *)(\S.*?)  # (True|False)$", r"\1assert bool(\2) is \3, \2", "\n".join(blocks), flags=re.MULTILINE
    )


def run(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, f"docs/howto/{page}.md", "exec"), names)


@pytest.fixture(scope="module")
def names(shared_fork_server: None) -> Iterator[dict[str, Any]]:
    """What the lines of the first page define."""
    defined: dict[str, Any] = {}
    run(code_of("index").replace('plan="even"', 'plan="even", progress=False'), "index", defined)
    defined["model"].cluster.workers()  # connections stand, and no test is taken to leave them
    with defined["model"]:
        yield defined


@pytest.mark.parametrize("page", NAMES)
def test_a_page_runs(page: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model: ll.ShardedModel = names["model"]
    before = model(IDS).logits
    torch.manual_seed(0)
    run(code_of(page), page, dict(names))
    assert torch.equal(model(IDS).logits, before)


def test_pages_are_found_and_say_what_is_true() -> None:
    assert len(NAMES) == 10
    codes = {page: code_of(page) for page in NAMES}
    assert sum(code.count("assert bool(") for code in codes.values()) >= 20
    for code in codes.values():
        ast.parse(textwrap.dedent(code))
