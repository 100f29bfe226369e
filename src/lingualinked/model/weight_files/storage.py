"""Where a worker of a daemon has weights: copies of files, and a cache.

Knows folders; neither spans nor sources on other hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.model.weight_files.held_files import HeldWeights
from lingualinked.model.weight_files.local_copies import LocalCopies
from lingualinked.model.weight_files.remote_weights import RemoteWeights

if TYPE_CHECKING:
    from pathlib import Path

    from lingualinked.model.spec import ModelSpec
    from lingualinked.model.weight_files.fetching import Fetcher, HeldFiles
    from lingualinked.model.weight_files.weight_cache import WeightCache
    from lingualinked.model.weights.weight_sources import WeightSource


class WeightStorage:
    """The disk of a worker on another host than its caller.

    Parameters
    ----------
    models : Path or None
        A folder with checkpoints at any depth up to six.
    cache : WeightCache or None
        Where fetched weights are kept; None: nowhere.
    hub : bool
        Whether Hugging Face's cache is searched as well.
    """

    def __init__(self, models: Path | None = None, cache: WeightCache | None = None, *, hub: bool = True) -> None:
        self._copies = LocalCopies(models, hub=hub)
        self._cache = cache

    def open_weights(self, spec: ModelSpec, fetcher: Fetcher) -> WeightSource:
        """Open the weights of a model, for a span that is loaded; use from one thread.

        Raises
        ------
        FetchError
            If headers are missing and no source has them, or the caller does not say what its files contain.
        ResourceError
            If the disk or the cache is too small for them.
        """
        if not spec.contents:  # its paths alone give nobody a file of this host
            raise FetchError("the caller can't say what the checkpoint's files contain: it can't read them any more")
        return RemoteWeights(spec, self._copies, self._cache, fetcher)

    def open_held(self, spec: ModelSpec) -> HeldFiles:
        """Open what is here of a model's files, to serve it to other workers; use from one thread."""
        found, _ = self._copies.find(spec)
        return HeldWeights(spec, found, self._cache)
