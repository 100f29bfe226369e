"""The commands of ``lingualinked bench`` and their options.

Knows typer; each measurement has a module of its own, which is imported when its command runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lingualinked.cli.output import check_output
from lingualinked.errors import ArgumentError
from lingualinked.workload import Workload

if TYPE_CHECKING:
    from lingualinked.cli.bench.measurement import Measurement
    from lingualinked.cli.bench.models import BenchModels, BenchOptions

app = typer.Typer(
    name="bench",
    help="Measure a model on your devices against other ways of running it, in one run, as a table or as JSON.",
    no_args_is_help=True,
)

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a checkpoint or of a config.json alone, a hub id, a built-in shape (160m, 1b, 8b or bloom-560m), or sample: "
        "the bundled checkpoint."
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        "-d",
        help="A number of local CPU workers, pinned to equal shares of the cores, a cluster file (TOML), or "
        "tcp://HOST:PORT#PUBLIC-KEY of a daemon.",
    ),
]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, ...")]
PlanFile = Annotated[
    str | None,
    typer.Option(
        "--plan", help="A file that `lingualinked plan --json` wrote, or even; by default measured and solved."
    ),
]
Against = Annotated[
    str,
    typer.Option(
        help="What else is measured, separated by commas, or none: uncut-1 and uncut-2 (transformers with 1 and 2 threads), one-step "
        "(sharded, one step at a time), lingualinked (LinguaLinked's way: no KV cache, a plan for the sum of costs), accelerate "
        "(half of the layers on disk), llama.cpp (over RPC)."
    ),
]
LlamaCpp = Annotated[
    Path | None, typer.Option("--llama-cpp", help="Folder of llama.cpp's programs; by default those on PATH.")
]
Slowdown = Annotated[float, typer.Option(min=1, help="Emulate local devices that are so many times slower.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds, in which every side has its turn.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")]
NewTokens = Annotated[int, typer.Option(min=3, help="Tokens per answer.")]
PromptTokens = Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")]

_UNCUT = "uncut-1,uncut-2"


@app.command()
def decode(
    context: typer.Context,
    model: Model = "160m",
    devices: Devices = "2",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of the batch; 1, and may be repeated.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of each row.")] = 1,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 32,
    against: Against = _UNCUT,
    plan: PlanFile = None,
    dtype: Dtype = "auto",
    slowdown: Slowdown = 1.0,
    llama_cpp: LlamaCpp = None,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Tokens per second after the prompt, of one stream and of batches."""
    from lingualinked.cli.bench.decode import measure_decode
    from lingualinked.cli.bench.models import BenchOptions

    options = BenchOptions(
        model=model,
        devices=devices,
        dtype=dtype,
        plan=plan,
        against=_modes(against),
        repeats=repeats,
        slowdown=slowdown,
        llama_cpp=llama_cpp,
    )
    sizes = rows or [1]
    most = max(sizes)
    workload = (
        None if most == 1 else Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=beams * most)
    )
    _run(
        context, options, json, lambda models: measure_decode(models, sizes, prompt_tokens, new_tokens, beams), workload
    )


@app.command()
def prefill(
    context: typer.Context,
    model: Model = "160m",
    devices: Devices = "2",
    tokens: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens of the prompt; 1,024, and may be repeated.")
    ] = None,
    chunk_size: Annotated[
        str,
        typer.Option(help="Tokens of a chunk of the sharded model, or auto, or whole."),
    ] = "auto",
    against: Against = _UNCUT,
    plan: PlanFile = None,
    dtype: Dtype = "auto",
    slowdown: Slowdown = 1.0,
    llama_cpp: LlamaCpp = None,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Tokens of a prompt per second, whole or in chunks that follow each other."""
    from lingualinked.cli.bench.models import BenchOptions
    from lingualinked.cli.bench.prefill import measure_prefill, read_chunk_size

    sizes, size = tokens or [1024], read_chunk_size(chunk_size)
    unknown = ("lingualinked",) if size is not None else ("lingualinked", "one-step")
    options = BenchOptions(
        model=model,
        devices=devices,
        dtype=dtype,
        plan=plan,
        against=_modes(against, without=unknown),
        repeats=repeats,
        slowdown=slowdown,
        llama_cpp=llama_cpp,
    )
    _run(context, options, json, lambda models: measure_prefill(models, sizes, size))


@app.command()
def throughput(
    context: typer.Context,
    model: Model = "160m",
    devices: Devices = "2",
    sessions: Annotated[int, typer.Option(min=2, help="Threads that call generate at once.")] = 4,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 32,
    against: Against = _UNCUT,
    plan: PlanFile = None,
    dtype: Dtype = "auto",
    slowdown: Slowdown = 1.0,
    llama_cpp: LlamaCpp = None,
    repeats: Repeats = 3,
    json: Json = None,
) -> None:
    """Answers to several prompts at once, against one after the other."""
    from lingualinked.cli.bench.models import BenchOptions
    from lingualinked.cli.bench.throughput import measure_sessions

    modes = _modes(against, without=("one-step", "lingualinked"))
    options = BenchOptions(
        model=model,
        devices=devices,
        dtype=dtype,
        plan=plan,
        against=modes,
        repeats=repeats,
        slowdown=slowdown,
        llama_cpp=llama_cpp,
    )
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_sessions=sessions)
    _run(context, options, json, lambda models: measure_sessions(models, sessions, prompt_tokens, new_tokens), workload)


@app.command()
def load(
    context: typer.Context,
    model: Model = "160m",
    devices: Devices = "2",
    requests: Annotated[int, typer.Option(min=2, help="Requests of random lengths.")] = 64,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest prompt.")] = 16,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 208,
    new_tokens: NewTokens = 32,
    against: Against = "uncut-2",
    plan: PlanFile = None,
    dtype: Dtype = "auto",
    slowdown: Slowdown = 1.0,
    repeats: Repeats = 1,
    json: Json = None,
) -> None:
    """Many requests of different lengths at once, by continuous batching."""
    from lingualinked.cli.bench.load import measure_load
    from lingualinked.cli.bench.models import BenchOptions

    if longest < shortest:
        raise ArgumentError(f"--longest {longest} is less than --shortest {shortest}")
    modes = _modes(against, without=("one-step", "lingualinked", "accelerate", "llama.cpp"))
    options = BenchOptions(
        model=model,
        devices=devices,
        dtype=dtype,
        plan=plan,
        against=modes,
        repeats=repeats,
        slowdown=slowdown,
    )
    workload = Workload(prompt_tokens=longest, new_tokens=new_tokens, num_sessions=requests)
    _run(
        context, options, json, lambda models: measure_load(models, requests, (shortest, longest), new_tokens), workload
    )


@app.command()
def overhead(
    context: typer.Context,
    stages: Annotated[int, typer.Option(min=1, help="Workers, each with a layer that computes next to nothing.")] = 2,
    steps: Annotated[int, typer.Option(min=8, help="Decode steps.")] = 1000,
    json: Json = None,
) -> None:
    """Cost of a hop without compute, by its parts, and bytes beside the hidden state."""
    from lingualinked.cli.bench.models import BenchOptions
    from lingualinked.cli.bench.overhead import measure_overhead, write_tiny

    with tempfile.TemporaryDirectory() as folder:
        write_tiny(folder, stages)
        options = BenchOptions(model=folder, devices=str(stages), plan="even")
        _run(context, options, json, lambda models: measure_overhead(models, steps))


@app.command()
def memory(
    context: typer.Context,
    model: Model = "160m",
    devices: Devices = "2",
    steps: Annotated[int, typer.Option(min=200, help="Decode steps.")] = 10_000,
    prompt_tokens: PromptTokens = 16,
    plan: PlanFile = None,
    dtype: Dtype = "auto",
    json: Json = None,
) -> None:
    """Memory of each process after many steps, against after 100."""
    from lingualinked.cli.bench.memory import measure_memory_growth
    from lingualinked.cli.bench.models import BenchOptions

    options = BenchOptions(model=model, devices=devices, dtype=dtype, plan=plan)
    _run(context, options, json, lambda models: measure_memory_growth(models, steps, prompt_tokens))


def _modes(against: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Read ``--against``, and refuse what a command has no measurement of."""
    if against == "none":
        return ()
    modes = tuple(mode.strip() for mode in against.split(","))
    for mode in modes:
        if mode in without:
            raise ArgumentError(f"--against {mode} is not measured by this command: leave it out")
    return modes


def _run(
    context: typer.Context,
    options: BenchOptions,
    json: Path | None,
    measure: Callable[[BenchModels], list[Measurement]],
    workload: Workload | None = None,
) -> None:
    """Measure, print the report, and write it if that was asked for."""
    from transformers.utils.logging import disable_progress_bar

    from lingualinked.cli.bench.machine import MachineClock
    from lingualinked.cli.bench.measurement import Report
    from lingualinked.cli.bench.models import BenchModels
    from lingualinked.console import new_console

    if json is not None:
        check_output("--json", json)
    disable_progress_bar()
    clock = MachineClock()
    with BenchModels(options, workload) as models:
        measured = tuple(measure(models))
    report = Report(command=_command_line(context), machine=clock.describe(), measurements=measured)
    new_console().print(report.to_rows())
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")


def _command_line(context: typer.Context) -> str:
    """Return the command that runs, with the options that were given, but for files of this machine."""
    words = ["lingualinked", "bench", context.info_name or ""]
    for parameter in context.command.params:
        source, value = context.get_parameter_source(parameter.name or ""), context.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or isinstance(value, Path):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [str(each)] if parameter.param_type_name == "argument" else [parameter.opts[0], str(each)]
    return " ".join(words)
