"""The message by which the caller edits tensors that stages hold.

Knows neither why they are edited nor how. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

import enum

from lingualinked.protocol.base import Message, Natural


class ChangeKind(enum.IntEnum):
    """What a change does with a tensor."""

    SET = 0
    ADD = 1
    ADD_PRODUCT = 2


class TensorChange(Message, frozen=True):
    """One change of a tensor, by a number that no other change of the model has.

    Its tensors are, by kind: the flat values of the elements from ``first`` on; what is added; or two factors, ``u`` and
    ``v``, whose outer product (of matrices, ``u @ v.T``) is added.
    """

    number: Natural
    kind: ChangeKind
    first: Natural = 0


class EditTensor(Message, frozen=True, tag=45):
    """Make the changes with these ``numbers``, in this order, the ones in force of a parameter or buffer of a model.

    They apply to the tensor as it was loaded, in all stages of the model that hold it or are being loaded. The tensors of
    ``new``, which were not in force before, are sent with the message.
    """

    request: int
    model: int
    name: str
    numbers: tuple[Natural, ...]
    new: tuple[TensorChange, ...]
