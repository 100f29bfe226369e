"""Messages of bytes and tensors between processes: keys, mailboxes, and the wire format of a message.

Knows no model, no cluster and not what a payload means; resolves its names on first use, so importing it loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.transport.delivery import Delivery
    from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
    from lingualinked.transport.keys import KeyPair, generate_keypair
    from lingualinked.transport.mailbox import Mailbox
    from lingualinked.transport.zmq_mailbox import ZmqMailbox

_HOMES = {
    "Delivery": "delivery",
    "InProcessHub": "inprocess",
    "InProcessMailbox": "inprocess",
    "KeyPair": "keys",
    "Mailbox": "mailbox",
    "ZmqMailbox": "zmq_mailbox",
    "generate_keypair": "keys",
}

__all__ = ["Delivery", "InProcessHub", "InProcessMailbox", "KeyPair", "Mailbox", "ZmqMailbox", "generate_keypair"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
