"""What a test makes a probe find is not kept for others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lingualinked.model.exact import kept_probes


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_probes, "_can_keep", lambda: False)
        yield
