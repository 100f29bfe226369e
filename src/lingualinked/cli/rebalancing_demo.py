"""``lingualinked demo --rebalance``: a device becomes slow while the bundled model answers, and its layers move away.

Knows the public API; prints.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.live import Live

import lingualinked as ll
from lingualinked.cli.demo_command import PROMPT, unsharded
from lingualinked.console import new_console
from lingualinked.display.decisions_view import migration_rows
from lingualinked.display.live import live_view
from lingualinked.quantities import count_text

_SLOWDOWN = 30.0  # makes the stages of the small bundled model take as long as those of a large one
_FACTOR = 4.0
_NUM_SESSIONS = 4
_NEW_TOKENS = 60
_FRAMES_PER_S = 5
_SPEED_S = 4.0  # the window for tokens per second


def run_rebalancing_demo(seconds: float, *, progress: bool) -> None:
    """Show a pipeline live: halfway through, its middle device drops to a quarter of its speed."""
    console = new_console()
    path = ll.sample_model()
    devices = [ll.Device(name=name, threads=1, slowdown=_SLOWDOWN) for name in ("laptop", "phone", "tablet")]
    workload = ll.Workload(prompt_tokens=8, new_tokens=_NEW_TOKENS, num_sessions=_NUM_SESSIONS)
    with ll.Cluster(devices) as cluster:
        model = ll.ShardedModel.from_pretrained(
            path, cluster=cluster, workload=workload, rebalance="auto", progress=progress
        )
        slow = model.plan.stages[len(model.plan.stages) // 2].device
        answers = _Answers(model)
        note, speeds, began_s = "all devices run at their usual speed", {}, time.monotonic()
        try:
            with Live(console=console, auto_refresh=False) as live:
                while (elapsed_s := time.monotonic() - began_s) < seconds:
                    if elapsed_s > seconds / 2 and "before" not in speeds:
                        speeds["before"] = model.telemetry.tokens_per_s(_SPEED_S)
                        cluster.throttle(slow, slowdown=_SLOWDOWN * _FACTOR)
                        note = f"{slow} dropped to a quarter of its speed {seconds / 2:.0f} s after the start"
                    live.update(
                        live_view(model.telemetry, last_s=seconds, note=note, width=min(console.width, 120)),
                        refresh=True,
                    )
                    time.sleep(1 / _FRAMES_PER_S)
            telemetry = model.telemetry
            speeds["after"] = telemetry.tokens_per_s(_SPEED_S)
        finally:
            answers.stop()
    console.print(migration_rows(telemetry.migrations, telemetry.history.start_s))
    console.print(f"\n{speeds['before']:.1f} tokens/s before, {speeds['after']:.1f} at the end")
    num_equal, wrong = answers.compare(path)
    if wrong:
        raise ll.LingualinkedError(
            f"of {count_text(num_equal + wrong, 'answer')}, {wrong} differ from the unsharded model's: please report this"
        )
    console.print(f"All of {count_text(num_equal, 'answer')} are [green]equal[/] to the unsharded model's.")


class _Answers:
    """Threads that make the model answer until they are stopped."""

    def __init__(self, model: Any) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        self._inputs = tokenizer(PROMPT, return_tensors="pt")
        self._model = model
        self._is_stopping = threading.Event()
        self._answers: list[Any] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(_NUM_SESSIONS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the answers in progress, and start no more."""
        self._is_stopping.set()
        for thread in self._threads:
            thread.join()

    def compare(self, path: str) -> tuple[int, int]:
        """Return the numbers of answers that equal the unsharded model's, and that differ."""
        import torch

        torch.set_num_threads(1)
        expected = self._generate(unsharded(path))
        num_equal = sum(torch.equal(answer, expected) for answer in self._answers)
        return num_equal, len(self._answers) - num_equal

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            self._answers.append(self._generate(self._model))

    def _generate(self, model: Any) -> Any:
        return model.generate(**self._inputs, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)
