"""The small trained checkpoint that ships inside the package.

Knows only where its files are; how it was made stands in its model card and in `sample_model/` of the repository.
"""

from __future__ import annotations

from pathlib import Path


def sample_model() -> str:
    """Return the folder of the bundled sample checkpoint.

    Returns
    -------
    str
        A local folder that `ShardedModel.from_pretrained` and ``AutoTokenizer.from_pretrained`` take; its
        ``README.md`` is the model card with prompt formats and held-out accuracies.
    """
    return str(Path(__file__).parent)
