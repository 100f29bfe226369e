"""The commands and their options.

Knows typer; each command's work lies in a module of its own, imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lingualinked.errors import LingualinkedError

app = typer.Typer(
    name="lingualinked",
    help="Run a causal LM that fits on none of your machines on all of them together, with exactly its own tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure against the unsharded model in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Devices = Annotated[int, typer.Option("--devices", "-d", min=1, help="Number of local CPU workers.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most.")]


@app.command()
def demo(
    devices: Devices = 3,
    max_new_tokens: NewTokens = 60,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Slow one of three imitated devices down, and watch layers move.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=4, help="How long to watch, with --rebalance.")] = 30,
) -> None:
    """Run the bundled sample model in worker processes and compare with the unsharded one."""
    if rebalance:
        from lingualinked.cli.rebalancing_demo import run_rebalancing_demo

        _run(lambda: run_rebalancing_demo(seconds))
        return
    from lingualinked.cli.demo import run_demo

    _run(lambda: run_demo(devices, max_new_tokens))


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    devices: Devices = 2,
    max_new_tokens: NewTokens = 64,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
) -> None:
    """Continue a prompt with any checkpoint, streaming the answer."""
    from lingualinked.cli.generate import run_generate

    options = {"do_sample": True, "temperature": temperature} if sample else {}
    _run(lambda: run_generate(path, prompt, devices, dtype, seed, max_new_tokens=max_new_tokens, **options))


@app.command()
def plan(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint or of a config.json alone, or a hub id.")],
    devices: Annotated[
        str, typer.Option("--devices", "-d", help="A cluster file (TOML), or a number of workers.")
    ] = "2",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a session.")] = 1,
    num_sessions: Annotated[int, typer.Option(min=1, help="Sessions in flight.")] = 1,
    objective: Annotated[str, typer.Option(help="throughput, latency or energy.")] = "throughput",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this file.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what limits it, and what would help.")] = False,
) -> None:
    """Say which device should hold which layers, and how fast that would be; loads nothing."""
    from lingualinked.cli.plan import run_plan
    from lingualinked.workload import Workload

    _run(
        lambda: run_plan(
            path,
            devices,
            Workload(
                prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, num_sessions=num_sessions
            ),
            objective,  # type: ignore[arg-type]  # solve() refuses others
            as_json=json,
            plot=plot,
            dtype=dtype,
            explain=explain,
        )
    )


@app.command()
def trace(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue, each in a session.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint, or a hub id; without it, the bundled model.")
    ] = None,
    devices: Annotated[
        str, typer.Option("--devices", "-d", help="A cluster file (TOML), or a number of workers.")
    ] = "3",
    max_new_tokens: NewTokens = 32,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", "-r", min=1, help="Sessions at once; else one per prompt, or per device if that is more."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("trace.json"),
) -> None:
    """Write a timeline of a running pipeline, to be opened in the Perfetto UI."""
    from lingualinked.cli.trace import run_trace

    _run(lambda: run_trace(model, prompts or [], devices, dtype, max_new_tokens, requests, output))


@app.command()
def doctor() -> None:
    """Say what this machine offers: threads, memory, accelerators, versions."""
    from lingualinked.cli.doctor import run_doctor

    _run(run_doctor)


@bench.command()
def start(
    devices: Devices = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
) -> None:
    """Time from nothing to the first token, against one plain process; and what planning adds."""
    from lingualinked.bench.start import run_planned_start, run_start

    _run(lambda: run_start(devices, repeats))
    _run(lambda: run_planned_start(devices, repeats))


@bench.command()
def overhead(
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
    context: Annotated[list[int] | None, typer.Option(help="Prompt lengths to measure at.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode in each run.")] = 32,
) -> None:
    """Decode speed of two workers with one thread each, against the unsharded model, and watched for rebalancing or not."""
    from lingualinked.bench.overhead import run_overhead

    _run(lambda: run_overhead(tuple(context or (16, 2048)), new_tokens, repeats))


@bench.command()
def predict(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each plan.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 64,
) -> None:
    """Predicted against measured and simulated speed on imitated clusters, and the solved plan against others."""
    from lingualinked.bench.predict import run_predict

    _run(lambda: run_predict(repeats, new_tokens, prompt_tokens))


@bench.command()
def planner(repeats: Annotated[int, typer.Option(min=1, help="Random problems of each size.")] = 5) -> None:
    """Time the planner, and compare its plans with the proven bound."""
    from lingualinked.bench.planner import run_planner

    _run(lambda: run_planner(repeats))


@bench.command()
def soak(
    migrations: Annotated[int, typer.Option(min=1, help="Random migrations.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the schedule.")] = 0,
) -> None:
    """Move layers at random while the bundled model answers: no token may change, nothing may be lost."""
    from lingualinked.bench.soak import run_soak

    _run(lambda: run_soak(migrations, seed))


@bench.command()
def rebalance(
    sessions: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each model once layers have moved.")] = 3,
) -> None:
    """One of three devices becomes four times slower: tokens/s with and without rebalancing, and of a fresh plan."""
    from lingualinked.bench.rebalance import run_rebalance

    _run(lambda: run_rebalance(sessions, new_tokens, repeats))


def _run(command: Callable[[], None]) -> None:
    """Run a command; the library's errors are printed as one line, not as a traceback."""
    try:
        command()
    except LingualinkedError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
