"""What happens to a pipeline, as its balancer hears of it, and what the balancer asks for.

Plain data; the time is part of every event, since the balancer has no other clock.
"""

from __future__ import annotations

import dataclasses

from lingualinked.planning.passage.holdings import Holdings
from lingualinked.planning.plan import Plan
from lingualinked.profile import Profile
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.samples import DeviceSample, StepSample


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceJoined:
    """A device may be used from now on; the profile has it, and all that it had before."""

    time_s: float
    device: str
    profile: Profile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReleased:
    """The user wants a device emptied, and nothing placed on it again."""

    time_s: float
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLost:
    """A device is gone; nothing is placed on it again."""

    time_s: float
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceAsked:
    """The user asks whether there is a better plan, or asks for one of his own."""

    time_s: float
    plan: Plan | None = None  # what to move to; None: what the solver finds, if it is plainly better
    dry_run: bool = False  # only say what would be done
    holdings: Holdings | None = None  # for a plan that is given where nothing is measured


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MigrationDone:
    """The plan that was asked for is in force."""

    time_s: float
    migration: Migration


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MigrationFailed:
    """The plan that was asked for could not be put in force; another one is: the old one, or one on the way."""

    time_s: float


Event = (
    StepSample  # a step has come back
    | DeviceSample  # a device has been looked at
    | DeviceJoined
    | DeviceReleased
    | DeviceLost
    | RebalanceAsked
    | MigrationDone
    | MigrationFailed
)


@dataclasses.dataclass(frozen=True, slots=True)
class Stay:
    """Keep a decision; nothing is to be done."""

    decision: Decision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Put plans in force, and then say `MigrationDone` or `MigrationFailed`; until then nothing else is asked for."""

    plans: tuple[Plan, ...]  # the last is what is wanted, those before it are on the way, so that memory suffices
    decision: Decision


Instruction = Stay | Migrate
