"""Who may use a daemon: the clients on this user's list, and those that it was started for.

Knows public keys and names; no sockets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lingualinked.public_key import raw_key
from lingualinked.transport.keys.key_lists import AuthorizedClients, default_client_name


class Clients:
    """The authorised clients, whose list may change while the daemon runs.

    Raises ArgumentError if a key or a line of the list can't be read.
    """

    def __init__(self, public_keys: Iterable[str]) -> None:
        self._given = {key: default_client_name(key) for key in public_keys if raw_key(key, "--authorize")}
        self._listed = AuthorizedClients()

    @property
    def names(self) -> Mapping[str, str]:
        """Names of the clients by their public keys."""
        return {**self._given, **self._listed.names}

    def refresh(self) -> bool:
        """Read the list again if it has changed; return whether other clients are authorised now."""
        return self._listed.refresh()
