"""The messages that put adapters into stages and remove them, as msgspec structs.

Knows neither where adapters come from nor what is computed with them. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

from lingualinked.model.adapters.adapter_data import Adapter
from lingualinked.protocol.base import Message


class AddAdapter(Message, frozen=True, tag=50):
    """Put modules of an adapter into stage ``stage``, in place of what it has of another number under this name.

    An adapter with many tensors comes in several messages. Its tensors are those of its modules, in order.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    adapter: Adapter


class RemoveAdapter(Message, frozen=True, tag=51):
    """Remove an adapter from stage ``stage``; does nothing if the stage does not have it."""

    request: int
    model: int
    plan_version: int
    stage: int
    name: str
