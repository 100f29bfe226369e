"""The commands and their options.

Knows typer; each command has a module of its own, which is imported when the command runs.
"""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lingualinked.cli import cache_command, keys_command
from lingualinked.cli.bench import commands as bench_commands
from lingualinked.errors import ArgumentError, LingualinkedError
from lingualinked.worker.daemon.command import serve
from lingualinked.workload import Workload

_INTERRUPTED = 130  # the exit status that a shell reports for a process ended by an interrupt


class _Commands(TyperGroup):
    """Turns the library's errors into one message, and an interrupt into an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LingualinkedError as error:
            message = str(error).partition("\n\nRemote traceback")[0]
            typer.secho(f"{type(error).__name__}: {message}", fg="red", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="lingualinked",
    help="Run a causal LM that fits on none of your machines on all of them together, with exactly its own tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_commands.app)
app.add_typer(cache_command.app)
app.add_typer(keys_command.app)
app.command("worker")(serve)

Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        "-d",
        help="A number of local CPU workers, a cluster file (TOML), or tcp://HOST:PORT#PUBLIC-KEY of a daemon.",
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, ...")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per session.")]
NumSessions = Annotated[
    int | None, typer.Option(min=1, help="Sessions in flight; by default not known: see docs/planning.md.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"lingualinked {importlib.metadata.version('lingualinked')}")
        raise typer.Exit


def _check_temperature(temperature: float | None) -> float | None:
    if temperature is not None and not 0 < temperature < math.inf:
        raise typer.BadParameter(f"{temperature:g} is not a positive, finite number")
    return temperature


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options that come before a command."""


@app.command()
def demo(
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "-d",
            help="A number of local CPU workers (by default 3), a cluster file (TOML), or tcp://HOST:PORT#PUBLIC-KEY of a daemon.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most; by default 60.")
    ] = None,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Slow down one of three emulated devices, and watch layers move.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=4, help="How long to watch, with --rebalance; by default 30.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the bundled sample model in worker processes and compare with the unsharded one."""
    if rebalance:
        for option, value in (("--devices", devices), ("--max-new-tokens", max_new_tokens)):
            if value is not None:
                raise ArgumentError(
                    f"{option} {value} has no effect with --rebalance, which brings its own devices: leave it out"
                )
        from lingualinked.cli.rebalancing_demo import run_rebalancing_demo

        run_rebalancing_demo(30 if seconds is None else seconds, progress=not quiet)
        return
    if seconds is not None:
        raise ArgumentError(f"--seconds {seconds:g} has no effect without --rebalance: leave it out")
    from lingualinked.cli.demo_command import run_demo

    run_demo("3" if devices is None else devices, max_new_tokens or 60, progress=not quiet)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    devices: Devices = "2",
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = "auto",
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(callback=_check_temperature, help="Sampling temperature, above 0; by default the model's."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed for sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print the prompt and special tokens too.")] = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt with any checkpoint, streaming the answer."""
    from lingualinked.cli.generate_command import run_generate

    if temperature is not None and not sample:
        raise ArgumentError(f"--temperature {temperature:g} has no effect without --sample: add it, or leave this out")
    options: dict[str, Any] = {"do_sample": True} if sample else {}
    if temperature is not None:
        options["temperature"] = temperature
    run_generate(
        path, prompt, devices, dtype, seed, raw=raw, progress=not quiet, max_new_tokens=max_new_tokens, **options
    )


@app.command()
def plan(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint or of a config.json alone, or a hub id.")],
    devices: Devices = "2",
    prompt_tokens: PromptTokens = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 128,
    batch_size: BatchSize = 1,
    num_sessions: NumSessions = None,
    objective: Annotated[str, typer.Option(help="throughput, latency or energy.")] = "throughput",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan to this file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Explain what limits the plan, and what would help.")
    ] = False,
    show_map: Annotated[
        bool,
        typer.Option(
            "--map", help="Show which tensors each stage consumes, from which stage, and their bytes per token."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Show which device should hold which layers, and the predicted speed; loads nothing."""
    from lingualinked.cli.plan_command import run_plan

    run_plan(
        path,
        devices,
        _workload(prompt_tokens, new_tokens, batch_size, num_sessions),
        objective,  # type: ignore[arg-type]  # solve() refuses others
        knows_sessions=num_sessions is not None,
        as_json=json,
        plot=plot,
        dtype=dtype,
        explain=explain,
        show_map=show_map,
        progress=not quiet,
    )


@app.command()
def trace(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue, each in its own session.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint, or a hub id; without it, the bundled model.")
    ] = None,
    devices: Devices = "3",
    max_new_tokens: NewTokens = 32,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-r",
            min=1,
            help="Concurrent sessions; by default one per prompt, or per device if there are more devices.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("trace.json"),
    quiet: Quiet = False,
) -> None:
    """Write a timeline of a running pipeline for the Perfetto UI."""
    from lingualinked.cli.trace_command import run_trace

    run_trace(model, prompts or [], devices, dtype, max_new_tokens, requests, output, progress=not quiet)


@app.command()
def discover(
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="How long to look.")] = 3.0,
    write: Annotated[Path | None, typer.Option(help="Write a cluster file of what is found.")] = None,
    interface: Annotated[
        str | None, typer.Option(help="Look on the interface that has this address alone; by default on all.")
    ] = None,
) -> None:
    """Find daemons of the local network that announce themselves; trusts none of them."""
    from lingualinked.cli.discover_command import run_discover

    run_discover(seconds, write, interface)


_OF_A_PLAN = ("prompt_tokens", "new_tokens", "batch_size", "num_sessions", "objective", "dtype")


@app.command()
def doctor(
    context: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", "-c", help="A cluster file (TOML), addresses of daemons, or a number of local workers."
        ),
    ] = None,
    toml: Annotated[
        Path | None, typer.Option(help="With --cluster: write a cluster file with the measured figures, for plan.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --cluster: a checkpoint, or a folder with a config.json, to plan for.")
    ] = None,
    prompt_tokens: PromptTokens = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 128,
    batch_size: BatchSize = 1,
    num_sessions: NumSessions = None,
    objective: Annotated[str, typer.Option(help="throughput, latency or energy.")] = "throughput",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Show what this machine offers or, with --cluster, what each device and link of a cluster does; status 1 if one fails."""
    if cluster is None:
        _refuse_options(context, ("toml", "model", *_OF_A_PLAN, "quiet"), "--cluster")
        from lingualinked.cli.doctor_command import run_doctor

        run_doctor()
        return
    if model is None:
        _refuse_options(context, _OF_A_PLAN, "--model")
    from lingualinked.cli.cluster_doctor import run_cluster_doctor

    is_well = run_cluster_doctor(
        cluster,
        toml=toml,
        model=model,
        dtype=dtype,
        workload=_workload(prompt_tokens, new_tokens, batch_size, num_sessions),
        knows_sessions=num_sessions is not None,
        objective=objective,  # type: ignore[arg-type]  # solve() refuses others
        progress=not quiet,
    )
    if not is_well:
        raise typer.Exit(1)


def _workload(prompt_tokens: int, new_tokens: int, batch_size: int, num_sessions: int | None) -> Workload:
    return Workload(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, num_sessions=num_sessions or 1
    )


def _refuse_options(context: typer.Context, names: tuple[str, ...], needed: str) -> None:
    """Refuse options that were given and have no effect without another one."""
    for name in names:
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{option} has no effect without {needed}: add it, or leave this out")
