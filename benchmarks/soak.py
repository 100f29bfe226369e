"""Random migrations under load, one after the other: whether any token changes, any session is lost, or memory grows.

Knows the public face; the bundled model on three workers, compared with the uncut one in this process.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lingualinked as ll
from lingualinked.cli.repeats import Repeats
from lingualinked.console import new_console
from lingualinked.quantities import bytes_text, count_text, seconds_text
from lingualinked.tables import Rows

_DEVICES = ("a", "b", "c")
_NEW_TOKENS = 60
_LOOKS = 10
CALLS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "one row": ((1, 5), {}),
    "three beams": ((2, 30), {"num_beams": 3}),
    "a long prompt": ((1, 200), {}),
}
"""What runs meanwhile: rows and tokens of the prompt, and arguments of ``generate``."""


def run_soak(num_migrations: int, seed: int) -> None:
    """Print how many migrations were done under load, what they took, and what was wrong.

    Raises
    ------
    LingualinkedError
        If any answer was not the uncut model's, or any session was lost.
    """
    torch.set_num_threads(1)
    console = new_console()
    path, rng = ll.sample_model(), random.Random(seed)  # noqa: S311 - a schedule, no secret
    whole = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(seed)
    prompts = {call: torch.randint(3, 400, shape, generator=generator) for call, (shape, _) in CALLS.items()}
    expected = {call: _generate(whole, prompts[call], call) for call in CALLS}
    num_layers = whole.config.num_hidden_layers
    devices = [ll.Device(name=name, threads=1) for name in _DEVICES]
    with ll.Cluster(devices) as cluster:
        model = ll.ShardedModel.from_pretrained(path, cluster=cluster, plan="even", progress=False)
        load = _Load(model, prompts, expected)
        resident = [_resident_bytes(cluster)]
        began_s = time.monotonic()
        try:
            for number in range(1, num_migrations + 1):
                while not model.rebalance(_random_plan(rng, num_layers)).moves:
                    pass  # by chance the plan in force
                if number % max(1, num_migrations // _LOOKS) == 0:
                    resident.append(_resident_bytes(cluster))
                    console.print(
                        f"{count_text(number, 'migration')}, {count_text(sum(load.num_equal.values()), 'answer')} equal, {len(load.wrong)} wrong, "
                        f"workers hold {bytes_text(resident[-1])}"
                    )
                if load.wrong:
                    break
        finally:
            load.stop()
        elapsed_s = time.monotonic() - began_s
        migrations = model.telemetry.migrations
        model.close()
    console.print(_table(migrations, load, resident, elapsed_s))
    if load.wrong:
        raise ll.LingualinkedError(
            f"{count_text(len(load.wrong), 'answer')} wrong or lost: {load.wrong[0]}; please report this"
        )


class _Load:
    """Threads that generate the same answers over and over, until they are stopped or one is wrong."""

    def __init__(self, model: Any, prompts: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        self.num_equal = dict.fromkeys(CALLS, 0)
        self.wrong: list[str] = []
        self._model, self._prompts, self._expected = model, prompts, expected
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(call,)) for call in CALLS]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the answers under way be the last ones."""
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _run(self, call: str) -> None:
        while not self._enough.is_set() and not self.wrong:
            try:
                tokens = _generate(self._model, self._prompts[call], call)
            except Exception as error:  # noqa: BLE001 - it is counted, and named at the end
                self.wrong.append(f"{call}: {type(error).__name__}: {error}")
                return
            if torch.equal(tokens, self._expected[call]):
                self.num_equal[call] += 1
            else:
                self.wrong.append(f"{call}: other tokens")


def _generate(model: Any, prompt: torch.Tensor, call: str) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW_TOKENS,
        eos_token_id=None,
        do_sample=False,
        **CALLS[call][1],
    )
    return tokens


def _random_plan(rng: random.Random, num_layers: int) -> ll.Plan:
    num_stages = rng.randint(1, len(_DEVICES))
    ends = [0, *sorted(rng.sample(range(1, num_layers), num_stages - 1)), num_layers]
    devices = rng.sample(_DEVICES, num_stages)
    return ll.Plan.from_spans((device, ends[index], ends[index + 1]) for index, device in enumerate(devices))


def _resident_bytes(cluster: ll.Cluster) -> int:
    return max(worker.resident_bytes for worker in cluster.workers())


def _table(migrations: Any, load: _Load, resident: list[int], elapsed_s: float) -> Rows:
    def times(values: list[float]) -> str:
        return f"{seconds_text(Repeats(values).median)}, at most {seconds_text(max(values))}"

    rows = [
        (
            "migrations",
            f"{len(migrations)} in {elapsed_s:.0f} s, {sum(not each.succeeded for each in migrations)} failed",
        ),
        ("answers equal", ", ".join(f"{count} of {call}" for call, count in load.num_equal.items())),
        ("answers wrong or lost", str(len(load.wrong))),
        ("loading weights beside the steps", times([each.load_s for each in migrations])),
        ("copying KV ahead", times([each.copy_s for each in migrations])),
        ("longest stall of a session", times([each.longest_stall_s for each in migrations])),
        ("largest worker", f"{bytes_text(resident[1])} after the first tenth, {bytes_text(resident[-1])} at the end"),
    ]
    return Rows("Random migrations under load", ("what", "seen"), rows)
