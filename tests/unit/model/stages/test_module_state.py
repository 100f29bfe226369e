"""What passes change in modules is found, whatever way they do it, and each session has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lingualinked.errors import ProtocolError, UncuttableModelError
from lingualinked.model.kv.kept_values import KeptValues
from lingualinked.model.stages.module_state import ModuleState


class Rebinding(nn.Module):
    """Adds up what it has seen, in a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self.total = states if self.total is None else self.total + states
        return self.total.clone()


class InPlace(Rebinding):
    """Adds it up in a buffer."""

    def __init__(self, size: int = 3) -> None:
        nn.Module.__init__(self)
        self.register_buffer("total", torch.zeros(size))

    def forward(self, states: Tensor) -> Tensor:
        return self.total.add_(states).clone()


class Counting(nn.Module):
    """Counts its passes."""

    num_passes = 0

    def forward(self, states: Tensor) -> Tensor:
        self.num_passes += 1
        return states * self.num_passes


class Listing(nn.Module):
    """Keeps what it has seen in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, states: Tensor) -> Tensor:
        self.seen.append(states)
        return torch.stack(self.seen).sum(0)


class NewBuffer(nn.Module):
    """Registers a buffer when it is first needed, as old code of rotary embeddings does."""

    def forward(self, states: Tensor) -> Tensor:
        total = self._buffers.get("total")
        self.register_buffer("total", states if total is None else total + states, persistent=False)
        return self.total.clone()


class LaterOnly(nn.Module):
    """Keeps nothing of its first pass."""

    is_begun = False
    extra = 0.0

    def forward(self, states: Tensor) -> Tensor:
        if self.is_begun:
            self.extra += float(states.sum())
        self.is_begun = True
        return states + self.extra


KINDS: list[Callable[[], nn.Module]] = [Rebinding, InPlace, Counting, Listing, NewBuffer, LaterOnly]


def tensor(value: float) -> Tensor:
    return torch.full((3,), value)


class Session:
    """Steps with what one session keeps, or with a module of its own."""

    def __init__(self, state: ModuleState, module: nn.Module) -> None:
        self.state, self.module, self.kept, self.num_steps = state, module, KeptValues(state.holds), 0

    @torch.inference_mode()
    def step(self, value: float) -> Tensor:
        with self.state.lent_to(self.kept, is_first=not self.num_steps):
            self.num_steps += 1
            return self.module(tensor(value))


@pytest.mark.parametrize("name", ["0.forward", "0.training", "0._parameters", "0._buffers.forward", "7.state"])
def test_a_peer_replaces_nothing_of_torch_nor_of_other_stages(name: str) -> None:
    state = ModuleState(nn.Sequential(nn.Linear(2, 2)), "own")
    assert state.holds("0.state")
    with pytest.raises(ProtocolError, match="this stage has no such place"):
        KeptValues(state.holds).write_state({name: 1}, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_session_has_its_own(kind: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.Identity(), kind())
    fresh = copy.deepcopy(model)
    state = ModuleState(model, "toy")
    values = [[1.0, 2.0, 5.0], [10.0, 20.0, 30.0, 40.0], [7.0]]
    expected = []
    for each in values:
        alone = copy.deepcopy(fresh)
        expected.append([alone(tensor(value)) for value in each])
    sessions = [Session(state, model) for _ in values]
    found: list[list[Tensor]] = [[], [], []]
    for index in (0, 1, 1, 0, 2, 1, 0, 1):
        found[index].append(sessions[index].step(values[index][len(found[index])]))
    for mine, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, mine, wanted))
    assert state
    # What modules hold by themselves is what they held before.
    assert torch.equal(model(tensor(3.0)), copy.deepcopy(fresh)(tensor(3.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_by_itself(kind: Callable[[], nn.Module]) -> None:
    model, alone = nn.Sequential(kind()), nn.Sequential(kind())
    state = ModuleState(model, "toy")
    first = Session(state, model)
    for value in (1.0, 2.0):
        assert torch.equal(first.step(value), alone(tensor(value)))
    second, beside = Session(state, model), copy.deepcopy(alone)
    second.kept, second.num_steps = first.kept.copy(), 2
    for value in (4.0, 8.0):
        assert torch.equal(first.step(value), alone(tensor(value)))
        assert torch.equal(second.step(-value), beside(tensor(-value)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_in_another_stage(kind: Callable[[], nn.Module]) -> None:
    model, alone = nn.Sequential(kind(), kind()), nn.Sequential(kind(), kind())
    session = Session(ModuleState(model, "toy"), model)
    for value in (1.0, 2.0):
        assert torch.equal(session.step(value), alone(tensor(value)))
    elsewhere = nn.Sequential(kind(), kind())
    moved = Session(ModuleState(elsewhere, "toy"), elsewhere)
    moved.num_steps = 2
    if kind is Listing:
        with pytest.raises(ProtocolError, match="a list that modules keep at 0\\.seen can't be sent"):
            session.kept.read_state(lambda _name: True)
        return
    names = set(session.kept.values)
    for path in ("0.", "1."):  # from two senders
        moved.kept.write_state(
            session.kept.read_state(lambda name, path=path: name.startswith(path)), torch.device("cpu")
        )
    assert set(moved.kept.values) == names
    assert torch.equal(moved.step(4.0), alone(tensor(4.0)))
    with pytest.raises(ProtocolError, match="'2\\.total', and this stage has no such place"):
        moved.kept.write_state({"2.total": None}, torch.device("cpu"))


def test_bytes_are_counted_once() -> None:
    model = nn.Sequential(Rebinding())
    session = Session(ModuleState(model, "toy"), model)
    assert session.kept.nbytes == 0
    session.step(1.0)
    assert session.kept.nbytes == 12
    session.kept.values["again"] = session.kept.values["0.total"][1:]
    assert session.kept.nbytes == 12
    session.kept.clear()
    assert not session.kept


def test_a_pass_that_fails_leaves_nothing() -> None:
    class Failing(Rebinding):
        def forward(self, states: Tensor) -> Tensor:
            super().forward(states)
            raise ValueError("no")

    model = nn.Sequential(Rebinding(), Failing())
    session = Session(ModuleState(model, "toy"), model)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            session.step(1.0)
        assert [each.total for each in model] == [None, None]


def test_what_is_too_large_for_a_copy_is_refused() -> None:
    class Large(InPlace):
        def forward(self, states: Tensor) -> Tensor:
            self.total[:3] += states
            return states

    model = nn.Sequential(Large(1 << 18))
    session = Session(ModuleState(model, "toy"), model)
    with pytest.raises(UncuttableModelError, match=r"toy.*changes 0\._buffers\.total in place, which is too large"):
        session.step(1.0)


def test_modules_that_keep_nothing_cost_nothing_later() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    state = ModuleState(model, "toy")
    session = Session(state, model)
    for value in (1.0, 2.0, 3.0, 4.0):
        session.step(value)
    assert not state
    looked_at: list[Any] = []
    state._see_all = lambda: looked_at.append(1) or {}  # type: ignore[func-returns-value,method-assign,assignment]
    session.step(5.0)
    assert not looked_at


def test_rows_of_sessions_are_joined() -> None:
    model, alone = nn.Sequential(Rebinding(), Counting()), nn.Sequential(Rebinding(), Counting())
    state = ModuleState(model, "toy")
    parts = [Session(state, model) for _ in range(2)]
    rows = torch.arange(9.0).reshape(3, 3)
    with torch.inference_mode():
        for first, last, part in ((0, 1, parts[0]), (1, 3, parts[1])):
            for is_first in (True, False):
                with state.lent_to(part.kept, is_first=is_first):
                    model(rows[first:last])
        for _ in range(2):
            alone(rows)
        parts[0].kept.append_rows([parts[1].kept], [1, 2])
        with state.lent_to(parts[0].kept, is_first=False):
            assert torch.equal(model(rows), alone(rows))
        with state.lent_to(parts[1].kept, is_first=False):
            model(rows[1:])
            model(rows[1:])
    with pytest.raises(ProtocolError, match=r"can't be joined: what modules keep at 1\.num_passes differs"):
        parts[0].kept.append_rows([parts[1].kept], [3, 2])


def test_what_changes_with_weights_is_for_all_sessions() -> None:
    class Once(Rebinding):
        is_scaled = False

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 8.0), requires_grad=False)

        def forward(self, states: Tensor) -> Tensor:
            if not self.is_scaled:
                self.weight.div_(2)
                self.is_scaled = True
            return super().forward(states * self.weight)

    model, alone = nn.Sequential(Once()), nn.Sequential(Once())
    state = ModuleState(model, "toy")
    for _ in range(2):
        session = Session(state, model)
        alone[0].total = None
        for value in (1.0, 2.0):
            assert torch.equal(session.step(value), alone(tensor(value)))
