"""Registers the functions that make tables, figures and data frames of records.

Knows all of them; draws nothing itself.
"""

from __future__ import annotations

from lingualinked.display.decisions_view import decision_rows, migration_rows
from lingualinked.display.frame import steps_frame
from lingualinked.display.plan_view import comparison_rows, plan_figure, plan_rows
from lingualinked.display.profile_view import profile_rows
from lingualinked.display.simulation_view import latency_rows, server_rows, simulation_figure
from lingualinked.display.telemetry_view import telemetry_figure, telemetry_rows
from lingualinked.display.transmission_view import transmission_rows
from lingualinked.planning.comparison import Comparison
from lingualinked.planning.plan import Plan
from lingualinked.planning.simulation.result import Simulation
from lingualinked.planning.transmission_map import TransmissionMap
from lingualinked.profile import Profile
from lingualinked.registry import figure_of, frame_of, tables_of
from lingualinked.tables import Rows
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.snapshot import Telemetry


def _decision_tables(decision: Decision) -> list[Rows]:
    """Make tables of a decision and of its migrations; times are relative to the decision."""
    done = [migration_rows(decision.migrations, decision.time_s)] if decision.migrations else []
    return [decision_rows([decision], decision.time_s), *done]


tables_of.register(Comparison, lambda comparison: [comparison_rows(comparison)])
tables_of.register(Decision, _decision_tables)
tables_of.register(Migration, lambda migration: [migration_rows([migration], migration.time_s)])
tables_of.register(Plan, lambda plan: [plan_rows(plan)])
tables_of.register(Profile, lambda profile: [profile_rows(profile)])
tables_of.register(Simulation, lambda simulation: [latency_rows(simulation), server_rows(simulation)])
tables_of.register(Telemetry, lambda telemetry: [telemetry_rows(telemetry)])
tables_of.register(TransmissionMap, lambda mapped: [transmission_rows(mapped)])

figure_of.register(Plan, plan_figure)
figure_of.register(Simulation, simulation_figure)
figure_of.register(Telemetry, telemetry_figure)

frame_of.register(Telemetry, lambda telemetry: steps_frame(telemetry.steps))
