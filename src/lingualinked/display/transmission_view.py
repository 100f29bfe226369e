"""Formats transmission maps as tables.

Knows maps; not how they are found.
"""

from __future__ import annotations

from lingualinked.planning.transmission_map import Consumed, MappedStage, TransmissionMap
from lingualinked.quantities import count_text
from lingualinked.tables import Rows


def transmission_rows(mapped: TransmissionMap) -> Rows:
    """Make a table of what each stage of a plan consumes."""
    notes = [f"every stage holds {', '.join(mapped.held)}"] if mapped.held else []
    if mapped.forbidden_cuts:
        notes.append(f"no stage may begin at layers {', '.join(map(str, mapped.forbidden_cuts))}")
    return Rows(
        title=f"Transmission map: {count_text(len(mapped.stages), 'stage')}",
        columns=("device", "stage", "layers", "consumes", "from", "bytes per token"),
        rows=[
            (*_place(index, stage, number == 0), each.name, _source(each), f"{each.token_bytes:,}")
            for index, stage in enumerate(mapped.stages)
            for number, each in enumerate(stage.consumed)
        ],
        notes=notes,
    )


def _place(index: int, stage: MappedStage, is_first: bool) -> tuple[str, str, str]:
    return (stage.device, str(index), f"[{stage.start}, {stage.end})") if is_first else ("", "", "")


def _source(consumed: Consumed) -> str:
    return "caller" if consumed.source is None else f"stage {consumed.source}"
