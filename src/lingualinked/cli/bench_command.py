"""``lingualinked bench``: how fast a model runs on the user's own devices, next to the prediction.

Knows the public API and cluster files; prints. The benchmarks of the repository time models in the same way.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from lingualinked.cli.demo_command import unsharded
from lingualinked.cli.devices_option import read_devices
from lingualinked.cli.plan_command import load_format_of
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.display.plan_view import plan_rows
from lingualinked.quantities import count_text
from lingualinked.tables import Rows

_NUM_STEPS = 12
_FIRST_ID = 3  # lower ids are often padding, beginning and end of text


@dataclasses.dataclass(slots=True)
class Speed:
    """The measured speed of a model, run by run."""

    first_token_s: list[float] = dataclasses.field(default_factory=list)  # of a single session
    step_s: list[float] = dataclasses.field(default_factory=list)  # the median decode step of a run
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)  # new ones, of all sessions together

    def time_stream(self, model: Any, workload: ll.Workload) -> None:
        """Time a single session: its first token, and the decode steps after it."""
        ids = draw_prompt(model, workload, 0)
        with torch.inference_mode():
            started = time.perf_counter()
            past = model(ids, logits_to_keep=1).past_key_values
            self.first_token_s.append(time.perf_counter() - started)
            steps = []
            for _ in range(_NUM_STEPS):
                started = time.perf_counter()
                model(ids[:, -1:], past_key_values=past)
                steps.append(time.perf_counter() - started)
        self.step_s.append(Repeats(steps).median)

    def time_sessions(self, model: Any, workload: ll.Workload, num_threads: int) -> None:
        """Time one answer per session, with as many sessions at once as there are threads."""

        def answer(session: int) -> None:
            generate(model, draw_prompt(model, workload, session), workload.new_tokens)

        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            started = time.perf_counter()
            for future in [pool.submit(answer, session) for session in range(workload.num_sessions)]:
                future.result()
            elapsed_s = time.perf_counter() - started
        self.tokens_per_s.append(workload.num_sessions * workload.batch_size * workload.new_tokens / elapsed_s)


def draw_prompt(model: Any, workload: ll.Workload, seed: int) -> torch.Tensor:
    """Draw random token ids of the workload's shape; equal seeds draw equal ids."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(_FIRST_ID, vocabulary, (workload.batch_size, workload.prompt_tokens), generator=generator)


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    """Generate exactly ``new_tokens`` tokens, past any end of text."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )


def run_bench(
    path: str,
    devices: str,
    workload: ll.Workload,
    dtype: str,
    plan: str | None,
    repeats: int,
    *,
    beside_unsharded: bool,
    progress: bool,
) -> None:
    """Print the plan with its predicted and measured speed, and that of the unsharded model if requested."""
    load_format = load_format_of(path)
    if beside_unsharded and load_format == "dummy":
        raise ll.ArgumentError(f"--unsharded needs weights, and {path!r} has only a config.json: leave it out")
    asked, given = read_devices(devices), _read_plan(plan)
    console = new_console()
    # 1) load the model by the given plan, or by one that is solved for
    with (
        ll.Cluster(asked) as cluster,
        ll.ShardedModel.from_pretrained(
            path,
            cluster=cluster,
            plan=given,
            workload=workload,
            dtype=dtype,
            load_format=load_format,
            progress=progress,
        ) as model,
    ):
        console.print(plan_rows(model.plan))
        console.print()
        # 2) warm up, so that the first use of each shape is not timed
        sides = {"measured": (model, Speed(), workload.num_sessions)}
        if beside_unsharded:
            sides["unsharded"] = (unsharded(path, dtype), Speed(), 1)
        for timed, _, _ in sides.values():
            generate(timed, draw_prompt(timed, workload, 0), 2)
        # 3) time both models in turns, since the speed of a machine drifts
        for _ in range(repeats):
            for timed, speed, num_threads in sides.values():
                speed.time_stream(timed, workload)
                speed.time_sessions(timed, workload, num_threads)
        # 4) compare with the prediction
        predicted = None if model.plan.profile is None else model.plan.predict(workload)
    console.print(_rows(workload, predicted, {name: speed for name, (_, speed, _) in sides.items()}, repeats))


def _read_plan(plan: str | None) -> Any:
    """Read ``--plan``: nothing, "even", or a file that ``lingualinked plan --json`` wrote."""
    if plan is None or plan == "even":
        return plan
    try:
        text = Path(plan).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ll.ArgumentError(
            f"no plan can be read from --plan {plan!r} ({error}): give a file written by `lingualinked plan --json`, "
            "or even"
        ) from error
    return ll.Plan.from_json(text)


def _rows(workload: ll.Workload, predicted: ll.Prediction | None, speeds: dict[str, Speed], repeats: int) -> Rows:
    measured, beside = speeds["measured"], speeds.get("unsharded")
    sessions = count_text(workload.num_sessions, "session")
    rows = []
    for what, name, scale in (
        ("first token, ms", "first_token_s", 1e3),
        ("decode step, ms", "step_s", 1e3),
        (f"tokens/s with {sessions}", "tokens_per_s", 1.0),
    ):
        ours = Repeats([scale * value for value in getattr(measured, name)])
        row = [what, "" if predicted is None else f"{scale * getattr(predicted, name):.1f}", ours.text(1)]
        if beside is not None:
            theirs = Repeats([scale * value for value in getattr(beside, name)])
            row += [theirs.text(1), ratios(ours, theirs).text(2)]
        rows.append(tuple(row))
    columns: tuple[str, ...] = ("what", "predicted", "measured")
    notes = ["In brackets: the lowest and the highest run."]
    if beside is not None:
        columns += ("unsharded", "ratio")
        notes.append(
            f"The unsharded model runs in this process on {count_text(torch.get_num_threads(), 'thread')}, one session "
            "after the other; the ratio is the sharded model's value divided by the unsharded model's."
        )
    shape = f"prompts of {workload.prompt_tokens}, answers of {count_text(workload.new_tokens, 'token')}"
    return Rows(f"Speed, {shape}, median of {repeats}", columns, rows, notes=notes)
