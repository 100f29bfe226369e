"""Formats decisions and migrations, as tables and as single lines.

Knows the records; not who decides, nor how layers are moved.
"""

from __future__ import annotations

from collections.abc import Sequence

from lingualinked.quantities import bytes_text, seconds_text
from lingualinked.tables import Rows
from lingualinked.telemetry.decisions import Decision, Migration


def decision_rows(decisions: Sequence[Decision], start_s: float = 0.0) -> Rows:
    """Make a table of decisions, with their reasons as notes; times are since ``start_s``."""
    return Rows(
        title="Decisions",
        columns=("at", "action", "step", "would be", "gain", "cost", "horizon", "to move"),
        rows=[
            (
                seconds_text(each.time_s - start_s),
                f"would {each.action}" if each.dry_run else each.action,
                seconds_text(each.before_s),
                seconds_text(each.after_s),
                seconds_text(each.gain_s),
                seconds_text(each.cost_s),
                seconds_text(each.horizon_s),
                bytes_text(each.moved_bytes),
            )
            for each in decisions
        ],
        notes=[record_line(each, start_s) for each in decisions],
    )


def migration_rows(migrations: Sequence[Migration], start_s: float = 0.0) -> Rows:
    """Make a table of migrations, with the moved layers or the error as notes; times are since ``start_s``."""
    return Rows(
        title="Migrations",
        columns=("at", "plan", "layers", "weights", "KV", "load", "copy", "switch", "longest stall", "sessions"),
        rows=[
            (
                seconds_text(each.time_s - start_s),
                str(each.plan_version) if each.succeeded else "failed",
                str(sum(move.end - move.start for move in each.moves)),
                bytes_text(each.weight_bytes),
                bytes_text(each.kv_bytes),
                seconds_text(each.load_s),
                seconds_text(each.copy_s),
                seconds_text(each.switch_s),
                seconds_text(each.longest_stall_s),
                str(each.num_sessions),
            )
            for each in migrations
        ],
        notes=[record_line(each, start_s) for each in migrations],
    )


def record_line(record: Decision | Migration, start_s: float) -> str:
    """Format a decision or a migration and its time, since ``start_s``, in one line."""
    return f"at {seconds_text(record.time_s - start_s)}: {record}"
