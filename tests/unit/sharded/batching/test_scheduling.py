"""The scheduler of continuous batching against simulated stages: every request ends once, and no limit is exceeded."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest
from hypothesis import given, settings, strategies

from lingualinked.sharded.batching.events import Admitted, Copy, Failed, Instruction, Limits, Outcome, Request, Run
from lingualinked.sharded.batching.scheduling import Scheduler

LIMITS = Limits(num_microbatches=2, max_tokens=64, chunk_tokens=32, max_requests=16, min_shared=8)


@dataclasses.dataclass
class Rooms:
    """Room for so many tokens."""

    capacity: int = 10**9
    held: dict[int, int] = dataclasses.field(default_factory=dict)
    kept: list[int] = dataclasses.field(default_factory=list)
    pinned: list[int] = dataclasses.field(default_factory=list)
    given_up: list[int] = dataclasses.field(default_factory=list)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.capacity

    def free_share(self) -> float:
        return 1 - sum(self.held.values()) / self.capacity

    def reserve(self, slot: int, num_tokens: int) -> bool:
        while self.capacity - sum(self.held.values()) + self.held.get(slot, 0) < num_tokens:
            if not self.give_up_one():
                return False
        self.held[slot] = num_tokens
        return True

    def free(self, slot: int) -> None:
        del self.held[slot]

    def keep(self, slot: int, num_tokens: int) -> None:
        assert num_tokens <= self.held[slot]
        self.held[slot] = num_tokens
        self.kept.append(slot)

    def pin(self, slot: int) -> bool:
        if slot in self.kept:
            self.pinned.append(slot)
        return slot in self.kept

    def unpin(self, slot: int) -> None:
        self.pinned.remove(slot)

    def give_up(self) -> bool:
        return sum(self.give_up_one() for _ in self.kept[:]) > 0

    def give_up_one(self) -> bool:
        for slot in self.kept:
            if slot not in self.pinned:
                self.kept.remove(slot)
                del self.held[slot]
                self.given_up.append(slot)
                return True
        return False

    def pop_given_up(self) -> list[int]:
        given_up, self.given_up = self.given_up, []
        return given_up


class Simulation:
    """Stages that answer in order; a request's next token is the sum of its text, so that a wrong text shows."""

    def __init__(self, limits: Limits = LIMITS, rooms: Rooms | None = None, ends: dict[str, int] | None = None) -> None:
        self.limits = limits
        self.rooms = rooms or Rooms()
        self.scheduler = Scheduler(limits, self.rooms)
        self.ends = ends or {}  # how many tokens a request really has
        self.texts: dict[int, list[int]] = {}  # by slot
        self.chosen: dict[str, list[int]] = {}
        self.admitted: list[str] = []
        self.finished: list[str] = []
        self.failed: dict[str, Failed] = {}
        self.runs: list[Run] = []
        self.pending: list[Instruction] = []
        self.errors: dict[str, Outcome] = {}  # of the next step, by request
        self.ended: set[int] = set()  # slots

    def add(self, key: str, ids: list[int], max_new: int | None = 4, **kwargs: object) -> Request:
        request = Request(key=key, ids=list(ids), max_new=max_new, **kwargs)  # type: ignore[arg-type]
        for each in (request, *request.children):
            self.chosen[each.key] = []
        self.scheduler.add(request)
        return request

    def advance(self) -> bool:
        """Carry out what is to be done, and end the oldest step or copy; return whether there was one."""
        for instruction in self.scheduler.next_instructions():
            if isinstance(instruction, Admitted):
                self.admitted.append(instruction.key)
            elif isinstance(instruction, Failed):
                assert instruction.key not in self.failed
                self.failed[instruction.key] = instruction
            else:
                self.begin(instruction)
        assert sum(self.rooms.held.values()) <= self.rooms.capacity
        if not self.pending:
            return False
        first = self.pending.pop(0)
        if isinstance(first, Copy):
            succeeded = not {first.source, first.target} & self.ended
            self.scheduler.end_copy(first.key, succeeded=succeeded)
        elif isinstance(first, Run):
            outcomes = {part.key: self.answer(part) for part in first.parts}
            self.errors.clear()
            self.scheduler.end_step(first.number, outcomes)
        return True

    def begin(self, instruction: Instruction) -> None:
        if isinstance(instruction, Run):
            in_flight = [part for each in self.pending if isinstance(each, Run) for part in each.parts]
            choosing = {part.key for part in in_flight if part.wants_choice}
            assert not choosing & {part.key for part in instruction.parts}
            assert len({part.key for part in instruction.parts}) == len(instruction.parts) <= self.limits.max_requests
            assert 0 < sum(len(part.ids) for part in instruction.parts) <= self.limits.max_tokens
            assert sum(isinstance(each, Run) for each in self.pending) < self.limits.num_microbatches
            for part in instruction.parts:
                self.texts.setdefault(part.slot, []).extend(part.ids)
                assert len(self.texts[part.slot]) <= self.rooms.held[part.slot]
            self.runs.append(instruction)
        elif isinstance(instruction, Copy):
            in_use = [part.slot for each in self.pending if isinstance(each, Run) for part in each.parts]
            assert instruction.source not in in_use, "it was copied during a step"
            assert len(self.texts[instruction.source]) >= instruction.num_tokens
            self.texts[instruction.target] = self.texts[instruction.source][: instruction.num_tokens]
        self.pending.append(instruction)

    def answer(self, part: object) -> Outcome:
        if part.key in self.errors:
            self.ended.add(part.slot)
        if part.slot in self.ended:  # an error ends the session
            return self.errors.get(part.key, Outcome(error=MemoryError(), lacks_memory=True))
        if not part.wants_choice:
            return Outcome()
        token = sum(self.texts[part.slot]) % 1000
        self.chosen[part.key].append(token)
        is_last = len(self.chosen[part.key]) == self.ends.get(part.key, 4)
        if is_last:
            self.finished.append(part.key)
        return Outcome(token=token, is_last=is_last)

    def run(self) -> None:
        while self.advance():
            pass


def expected(ids: list[int], num_new: int = 4) -> list[int]:
    text = list(ids)
    for _ in range(num_new):
        text.append(sum(text) % 1000)
    return text[len(ids) :]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(100), k=length)


def test_a_prompt_is_computed_and_continued() -> None:
    simulation = Simulation()
    simulation.add("a", prompt(0, 10))
    simulation.run()
    assert [[len(part.ids) for part in run.parts] for run in simulation.runs] == [[10], [1], [1], [1]]
    assert simulation.chosen["a"] == expected(prompt(0, 10))
    assert simulation.scheduler.is_idle


def test_groups_in_flight_are_of_one_size() -> None:
    simulation = Simulation()
    for index in range(8):
        simulation.add(str(index), prompt(index, 4), max_new=30)
        simulation.ends[str(index)] = 30
    simulation.run()
    sizes = [len(run.parts) for run in simulation.runs[4:-4]]
    assert set(sizes) == {4}


def test_a_long_prompt_goes_in_chunks_that_are_in_flight_together() -> None:
    simulation = Simulation()
    simulation.add("long", prompt(0, 100))
    simulation.advance()
    assert [[len(part.ids) for part in run.parts] for run in simulation.runs] == [[32], [32]]
    simulation.run()
    assert [len(run.parts[0].ids) for run in simulation.runs[:4]] == [32, 32, 32, 4]
    assert simulation.chosen["long"] == expected(prompt(0, 100))


def test_a_prompt_that_fits_a_microbatch_is_not_cut() -> None:
    simulation = Simulation()
    for index, length in enumerate([20, 20, 10, 30]):
        simulation.add(str(index), prompt(index, length))
    simulation.run()
    assert [[len(part.ids) for part in run.parts] for run in simulation.runs[:2]] == [[20, 10], [20]]
    assert simulation.chosen == {str(i): expected(prompt(i, n)) for i, n in enumerate([20, 20, 10, 30])}


def test_requests_wait_for_room_in_their_order() -> None:
    simulation = Simulation(rooms=Rooms(capacity=40))
    for index, length in enumerate([30, 30, 2]):
        simulation.add(str(index), prompt(index, length))
    simulation.run()
    assert simulation.admitted == ["0", "1", "2"]
    assert simulation.finished == ["0", "1", "2"] or simulation.finished[0] == "0"
    assert simulation.failed == {}


def test_a_request_that_can_never_fit_fails_alone() -> None:
    simulation = Simulation(rooms=Rooms(capacity=40))
    simulation.add("large", prompt(0, 38))
    simulation.add("small", prompt(1, 30))
    simulation.run()
    assert simulation.failed == {"large": Failed("large", None, 41)}
    assert simulation.finished == ["small"]


def test_without_a_limit_a_request_grows_and_gives_way() -> None:
    simulation = Simulation(rooms=Rooms(capacity=200), ends={"a": 90, "b": 90})
    for index, key in enumerate("ab"):
        simulation.add(key, prompt(index, 50), max_new=None)
    simulation.run()
    assert simulation.chosen == {"a": expected(prompt(0, 50), 90), "b": expected(prompt(1, 50), 90)}


def test_without_a_limit_a_request_fails_once_nothing_else_can_give_way() -> None:
    simulation = Simulation(rooms=Rooms(capacity=100), ends={"a": 90})
    simulation.add("a", prompt(0, 50), max_new=None)
    simulation.run()
    assert simulation.failed == {"a": Failed("a", None, 101)}
    assert simulation.rooms.held == {}


def test_higher_priority_first_and_nobody_waits_for_ever() -> None:
    simulation = Simulation(rooms=Rooms(capacity=40))
    simulation.add("first", prompt(0, 30))
    simulation.advance()
    simulation.add("low", prompt(1, 30))
    for index in range(100):
        simulation.add(f"high {index}", prompt(2, 3), priority=1)
    simulation.run()
    assert simulation.admitted[0] == "first"
    assert simulation.admitted[1] == "high 0"
    assert simulation.admitted.index("low") == 65


def test_a_common_beginning_is_copied_from_a_live_request_and_from_one_that_has_ended() -> None:
    simulation = Simulation()
    common = prompt(0, 20)
    for key in "abc":
        simulation.add(key, [*common, *prompt(ord(key), 5)])
    simulation.run()
    simulation.add("later", [*common, 7])
    simulation.run()
    first = [len(part.ids) for run in simulation.runs for part in run.parts if part.key in "abc" and len(part.ids) > 1]
    assert sorted(first) == [5, 5, 25]
    assert [len(run.parts[0].ids) for run in simulation.runs[-4:]] == [1, 1, 1, 1]
    for key in "abc":
        assert simulation.chosen[key] == expected([*common, *prompt(ord(key), 5)])
    assert simulation.chosen["later"] == expected([*common, 7])


def test_what_is_kept_is_given_up_first() -> None:
    simulation = Simulation(rooms=Rooms(capacity=60))
    simulation.add("a", prompt(0, 40))
    simulation.run()
    assert len(simulation.rooms.kept) == 1
    simulation.add("b", prompt(1, 40))
    simulation.run()
    assert simulation.finished == ["a", "b"]
    simulation.add("c", [*prompt(0, 40)])
    simulation.run()
    assert simulation.chosen["c"] == expected(prompt(0, 40))


def test_children_begin_with_a_copy_of_the_prompt() -> None:
    simulation = Simulation(limits=dataclasses.replace(LIMITS, min_shared=sys.maxsize))
    children = [Request(key=f"child {index}", ids=prompt(0, 20), max_new=4) for index in range(3)]
    simulation.add("parent", prompt(0, 20), children=children)
    simulation.run()
    assert [len(part.ids) for run in simulation.runs for part in run.parts if len(part.ids) > 1] == [19]
    assert all(tokens == expected(prompt(0, 20)) for tokens in simulation.chosen.values())
    assert len(simulation.finished) == 4
    assert simulation.rooms.held == {}


def test_children_without_room_begin_later() -> None:
    simulation = Simulation(limits=dataclasses.replace(LIMITS, min_shared=sys.maxsize), rooms=Rooms(capacity=50))
    children = [Request(key=f"child {index}", ids=prompt(0, 20), max_new=4) for index in range(3)]
    simulation.add("parent", prompt(0, 20), children=children)
    simulation.run()
    assert all(tokens == expected(prompt(0, 20)) for tokens in simulation.chosen.values())
    assert len(simulation.finished) == 4


def test_a_cancelled_request_ends_when_its_step_has() -> None:
    simulation = Simulation(limits=dataclasses.replace(LIMITS, min_shared=sys.maxsize))
    simulation.add("a", prompt(0, 10))
    simulation.add("b", prompt(1, 10))
    simulation.scheduler.next_instructions()
    assert simulation.scheduler.cancel("a")
    assert not simulation.scheduler.cancel("a")
    assert len(simulation.rooms.held) == 2
    simulation.scheduler.end_step(0, {"a": Outcome(token=1), "b": Outcome(token=1)})
    assert len(simulation.rooms.held) == 1


def test_a_failure_of_one_part_is_that_requests_own() -> None:
    simulation = Simulation()
    simulation.add("a", prompt(0, 10))
    simulation.add("b", prompt(1, 10))
    simulation.errors["a"] = Outcome(error=ValueError("broken"))
    simulation.run()
    assert list(simulation.failed) == ["a"]
    assert simulation.finished == ["b"]


@pytest.mark.parametrize("num_others", [0, 1])
def test_one_that_lacks_memory_begins_anew_when_another_has_ended(num_others: int) -> None:
    simulation = Simulation(limits=dataclasses.replace(LIMITS, min_shared=sys.maxsize))
    for index in range(num_others):
        simulation.add(str(index), prompt(index, 10))
    simulation.add("a", prompt(9, 100))
    simulation.errors["a"] = Outcome(error=MemoryError(), lacks_memory=True)
    simulation.run()
    if num_others:
        assert simulation.chosen["a"] == expected(prompt(9, 100))
    else:
        assert list(simulation.failed) == ["a"]


def test_prompts_may_come_first() -> None:
    simulation = Simulation(limits=dataclasses.replace(LIMITS, prompts_first=True, max_tokens=32))
    simulation.add("a", prompt(0, 4), max_new=9)
    simulation.advance()
    for index in range(4):
        simulation.add(str(index), prompt(index, 32))
    simulation.advance()
    assert [len(part.ids) for part in simulation.runs[-1].parts] == [32]


@settings(max_examples=60)
@given(strategies.integers(0, 10**6))
def test_whatever_comes_every_request_ends_once(seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(
        num_microbatches=rng.randint(1, 4),
        max_tokens=rng.randint(8, 40),
        chunk_tokens=rng.randint(4, 40),
        max_requests=rng.randint(1, 8),
        prompts_first=rng.random() < 0.5,
        min_shared=rng.choice([2, 8, sys.maxsize]),
        margin=rng.choice([0.0, 0.2]),
    )
    simulation = Simulation(limits, Rooms(capacity=rng.randint(60, 300)))
    texts: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    num_requests = rng.randint(1, 25)
    while len(texts) < num_requests or simulation.pending or not simulation.scheduler.is_idle:
        if len(texts) < num_requests and rng.random() < 0.4:
            key = str(len(texts))
            text = [*prompt(rng.randint(0, 2), rng.randint(1, 40)), *prompt(rng.randint(0, 99), rng.randint(0, 10))]
            texts[key] = text
            simulation.ends[key] = rng.randint(1, 9)
            children = []
            if rng.random() < 0.2:
                children = [Request(key=f"{key}.{index}", ids=list(text), max_new=9) for index in range(2)]
                for child in children:
                    texts[child.key], simulation.ends[child.key] = text, rng.randint(1, 9)
            max_new = rng.choice([None, 9])
            simulation.add(key, text, max_new, priority=rng.randint(0, 2), children=children)
        if texts and rng.random() < 0.05:
            key = rng.choice([*texts])
            if simulation.scheduler.cancel(key):
                cancelled |= {key, *(each for each in texts if each.startswith(f"{key}."))}
        if texts and rng.random() < 0.05:
            simulation.errors[rng.choice([*texts])] = Outcome(error=MemoryError(), lacks_memory=True)
        simulation.advance()
    assert set(simulation.rooms.held) == set(simulation.rooms.kept)
    for key, text in texts.items():
        if key in cancelled:
            continue
        assert (key in simulation.failed) != (key in simulation.finished)
        if key in simulation.finished:
            assert simulation.chosen[key] == expected(text, simulation.ends[key])
