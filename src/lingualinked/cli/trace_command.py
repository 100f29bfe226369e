"""``lingualinked trace``: writes a timeline of a running pipeline, for the Perfetto UI.

Knows the public API and cluster files; prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.text import Text

import lingualinked as ll
from lingualinked.cli.devices_option import read_devices
from lingualinked.cli.generate_command import encode, read_tokenizer
from lingualinked.cli.output import check_output
from lingualinked.console import new_console
from lingualinked.display.stages_view import stage_rows
from lingualinked.quantities import bytes_text, count_text

PROMPTS = ("Once upon a time there lived", "The little dog ran", "One day a girl went to", "Deep in the forest")


def run_trace(
    path: str | None,
    prompts: Sequence[str],
    devices: str,
    dtype: str,
    max_new_tokens: int,
    num_requests: int | None,
    output: Path,
    *,
    progress: bool,
) -> None:
    """Run concurrent sessions, write their trace, and print the times of a step and how to open the trace."""
    check_output("--output", output)
    if num_requests is not None and num_requests < len(prompts):
        raise ll.ArgumentError(
            f"--requests {num_requests} is less than the {count_text(len(prompts), 'prompt')}: give at least one session per prompt"
        )
    asked = read_devices(devices)
    path = ll.sample_model() if path is None else path
    texts = list(prompts) or list(PROMPTS)
    num_requests = num_requests or max(len(prompts), len(asked.devices))
    tokenizer = read_tokenizer(path)
    inputs = [encode(tokenizer, text) for text in texts]
    # On any exit the model is closed first: calls in progress then raise, so that the pool does not wait for ever.
    with ThreadPoolExecutor(num_requests) as pool, ll.Cluster(asked) as cluster:
        workload = ll.Workload(
            prompt_tokens=max(each["input_ids"].shape[1] for each in inputs),
            new_tokens=max_new_tokens,
            num_sessions=num_requests,
        )
        with ll.ShardedModel.from_pretrained(
            path, cluster=cluster, workload=workload, dtype=dtype, progress=progress
        ) as model:
            futures = [
                pool.submit(_generate, model, each, max_new_tokens) for each in islice(cycle(inputs), num_requests)
            ]
            num_tokens = sum(future.result() for future in futures)
            telemetry = model.telemetry
    try:
        written = telemetry.to_perfetto(output).resolve()
    except OSError as error:
        raise ll.ArgumentError(f"no trace can be written to --output {str(output)!r}: {error}") from error
    console = new_console()
    console.print(stage_rows(telemetry.history))
    tokens, steps = count_text(num_tokens, "token"), count_text(len(telemetry.steps), "step")
    sessions = count_text(num_requests, "session") + " at once" * (num_requests > 1)
    console.print(
        Text(f"\n{tokens} in {sessions}. The trace of {steps} takes {bytes_text(written.stat().st_size)} and is here:")
    )
    console.print(str(written), highlight=False, soft_wrap=True, markup=False)  # so that the path can be copied
    console.print(Text("Drop it on https://ui.perfetto.dev: the browser reads it and sends it nowhere."))


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> int:
    """Answer one prompt and return the number of new tokens."""
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return int(tokens.shape[1] - inputs["input_ids"].shape[1])
