"""How a worker rounds, as plain data: what tells two workers apart, and what a row's bits depend on.

Knows no torch; `model/exact/rounding_probe.py` finds it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec


class Rounding(msgspec.Struct, frozen=True):
    """How a worker's torch rounds in one dtype, on its processor and with its threads.

    Parameters
    ----------
    fingerprint : str
        Digest of the bits of some results: workers with the same one sum in the same order. Empty: not known.
    independent_rows : int
        From so many rows on, the bits of a batch's row do not depend on the other rows; 0: they always may.
    """

    fingerprint: str
    independent_rows: Annotated[int, msgspec.Meta(ge=0)]


class Invariance(msgspec.Struct, frozen=True):
    """Whether the bits of a stage's texts depend on nothing but themselves.

    Parameters
    ----------
    fingerprint : str
        As that of `Rounding`, with one thread.
    because : str
        Why they may depend on other texts or on the number of threads; empty: they do not.
    """

    fingerprint: str
    because: str


def describe_variance(invariances: Mapping[str, Invariance], processors: Mapping[str, str]) -> str:
    """Say why a text's bits may depend on other texts, or on where it is computed; empty if they do not."""
    for device, invariance in invariances.items():
        if invariance.because:
            return f"device {device!r}: {invariance.because}"
    roundings = {device: Rounding(each.fingerprint, 0) for device, each in invariances.items()}
    difference = describe_difference(roundings, processors)
    return difference and f"{difference}: use devices with one kind of processor"


def describe_difference(roundings: Mapping[str, Rounding], processors: Mapping[str, str] | None = None) -> str:
    """Say why the workers of some devices can't give the bits of one; empty if they can.

    Devices with processors of one name round alike; with several names, each must have a fingerprint that shows it.
    """
    groups: dict[str, list[str]] = {}
    for device, rounding in roundings.items():
        if rounding.fingerprint:
            groups.setdefault(rounding.fingerprint, []).append(device)
    if len(groups) > 1:
        return f"{' and '.join(', '.join(map(repr, names)) for names in groups.values())} sum in different orders"
    unknown = [device for device, rounding in roundings.items() if not rounding.fingerprint]
    names = {(processors or {}).get(device, "") for device in roundings}
    if unknown and len(names) > 1:
        return (
            f"processors differ ({', '.join(sorted(names))}), and {', '.join(map(repr, unknown))} had no memory to find "
            "out how it rounds"
        )
    return ""


def independent_rows(roundings: Iterable[Rounding]) -> int:
    """Return from how many rows on a row's bits depend on no other row in any of the workers; 0 if they may."""
    counts = [rounding.independent_rows for rounding in roundings]
    return max(counts) if counts and all(counts) else 0
