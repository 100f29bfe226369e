"""The commands of ``lingualinked bench`` and their options.

Knows typer; each measurement has a module of its own, which is imported when its command runs.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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


class Task(NamedTuple):
    """What a command does with the models, and the workload that they are placed for; None: any."""

    measure: Callable[[BenchModels], list[Measurement]]
    workload: Workload | None = None


Json = Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")]
NewTokens = Annotated[int, typer.Option(min=3, help="Tokens per answer.")]
PromptTokens = Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")]

_UNCUT = "uncut-1,uncut-2"
_BEFORE_OWN = ("model", "devices")  # a command's own options come behind these
_SHARED: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str,
            typer.Argument(
                help="Folder of a checkpoint or of a config.json alone, a hub id, a built-in shape (160m, 1b, 8b or bloom-560m), or "
                "sample: the bundled checkpoint."
            ),
        ],
        "160m",
    ),
    "devices": (
        Annotated[
            str,
            typer.Option(
                "--devices",
                "-d",
                help="A number of local CPU workers, pinned to equal shares of the cores, a cluster file (TOML), or "
                "tcp://HOST:PORT#PUBLIC-KEY of a daemon.",
            ),
        ],
        "2",
    ),
    "against": (
        Annotated[
            str,
            typer.Option(
                help="What else is measured, separated by commas, or none: uncut-1 and uncut-2 (transformers with 1 and 2 threads), "
                "one-step (sharded, one step at a time), lingualinked (LinguaLinked's way: no KV cache, a plan for the sum of costs), "
                "accelerate (half of the layers on disk), llama.cpp (over RPC)."
            ),
        ],
        _UNCUT,
    ),
    "plan": (
        Annotated[
            str | None,
            typer.Option(
                "--plan", help="A file that `lingualinked plan --json` wrote, or even; by default measured and solved."
            ),
        ],
        None,
    ),
    "dtype": (Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, ...")], "auto"),
    "slowdown": (
        Annotated[float, typer.Option(min=1, help="Emulate local devices that are so many times slower.")],
        1.0,
    ),
    "llama_cpp": (
        Annotated[
            Path | None, typer.Option("--llama-cpp", help="Folder of llama.cpp's programs; by default those on PATH.")
        ],
        None,
    ),
    "repeats": (Annotated[int, typer.Option(min=1, help="Rounds, in which every side has its turn.")], 3),
    "json": (Json, None),
}
"""Options that commands share: how each is read, and its default. All but the last are those of `BenchOptions`."""


def _command(
    *, lacks: tuple[str, ...] = (), without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Callable[..., Task]], None]:
    """Make a command of a function that reads its own options and returns what to measure.

    It has the shared options but for those that it ``lacks``, with other ``defaults`` where some are given, and no measurement of the
    sides that it is ``without``.
    """
    shared = {name: option for name, option in _SHARED.items() if name not in lacks}

    def decorate(read: Callable[..., Task]) -> None:
        own = list(inspect.signature(read, eval_str=True).parameters)

        def command(context: typer.Context, **given: Any) -> None:
            from lingualinked.cli.bench.models import BenchOptions

            task = read(**{name: given.pop(name) for name in own})
            json = given.pop("json")
            if "against" in given:
                given["against"] = _read_sides(given["against"])
                _refuse_sides(given["against"], without)
            _run(context, BenchOptions(**given), json, task)

        command.__signature__ = _signature(read, shared, defaults)  # type: ignore[attr-defined]
        app.command(read.__name__, help=read.__doc__)(command)

    return decorate


def _signature(read: Callable[..., Task], shared: dict[str, tuple[Any, Any]], defaults: dict[str, Any]) -> Any:
    """Return the parameters that typer makes options of: the shared ones around a command's own."""
    named = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", named, annotation=typer.Context)
    options = {
        name: inspect.Parameter(name, named, default=defaults.get(name, default), annotation=annotation)
        for name, (annotation, default) in shared.items()
    }
    first = [options.pop(name) for name in _BEFORE_OWN]
    own = [each.replace(kind=named) for each in inspect.signature(read, eval_str=True).parameters.values()]
    return inspect.Signature([context, *first, *own, *options.values()])


@_command()
def decode(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of the batch; 1, and may be repeated.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of each row.")] = 1,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 32,
) -> Task:
    """Tokens per second after the prompt, of one stream and of batches."""
    from lingualinked.cli.bench.decode import measure_decode

    sizes = rows or [1]
    most = max(sizes)
    return Task(
        lambda models: measure_decode(models, sizes, prompt_tokens, new_tokens, beams),
        None if most == 1 else Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=beams * most),
    )


@_command(without=("lingualinked",))
def prefill(
    tokens: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens of the prompt; 1,024, and may be repeated.")
    ] = None,
    chunk_size: Annotated[
        str, typer.Option(help="Tokens of a chunk of the sharded model, or auto, or whole.")
    ] = "auto",
) -> Task:
    """Tokens of a prompt per second, whole or in chunks that follow each other."""
    from lingualinked.cli.bench.prefill import measure_prefill, read_chunk_size

    sizes, size = tokens or [1024], read_chunk_size(chunk_size)

    def measure(models: BenchModels) -> list[Measurement]:
        if size is None:
            _refuse_sides(models.options.against, ("one-step",))
        return measure_prefill(models, sizes, size)

    return Task(measure, Workload(prompt_tokens=max(sizes), new_tokens=1, prefill_chunk_size=size))


@_command(without=("one-step", "lingualinked"))
def throughput(
    sessions: Annotated[int, typer.Option(min=2, help="Threads that call generate at once.")] = 4,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 32,
) -> Task:
    """Answers to several prompts at once, against one after the other."""
    from lingualinked.cli.bench.throughput import measure_sessions

    return Task(
        lambda models: measure_sessions(models, sessions, prompt_tokens, new_tokens),
        Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_sessions=sessions),
    )


@_command(
    lacks=("llama_cpp",),
    without=("one-step", "lingualinked", "accelerate", "llama.cpp"),
    against="uncut-2",
    repeats=1,
)
def load(
    requests: Annotated[int, typer.Option(min=2, help="Requests of random lengths.")] = 64,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest prompt.")] = 16,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 208,
    new_tokens: NewTokens = 32,
) -> Task:
    """Many requests of different lengths at once, by continuous batching."""
    from lingualinked.cli.bench.load import measure_load

    if longest < shortest:
        raise ArgumentError(f"--longest {longest} is less than --shortest {shortest}")
    return Task(
        lambda models: measure_load(models, requests, (shortest, longest), new_tokens),
        Workload(prompt_tokens=longest, new_tokens=new_tokens, num_sessions=requests),
    )


@_command(lacks=("against", "slowdown", "llama_cpp", "repeats"))
def memory(
    steps: Annotated[int, typer.Option(min=200, help="Decode steps.")] = 10_000,
    prompt_tokens: PromptTokens = 16,
) -> Task:
    """Memory of each process after many steps, against after 100."""
    from lingualinked.cli.bench.memory import measure_memory_growth

    return Task(lambda models: measure_memory_growth(models, steps, prompt_tokens))


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
        _run(context, options, json, Task(lambda models: measure_overhead(models, steps)))


def _read_sides(against: str) -> tuple[str, ...]:
    """Read ``--against``."""
    return () if against == "none" else tuple(side.strip() for side in against.split(","))


def _refuse_sides(sides: tuple[str, ...], without: tuple[str, ...]) -> None:
    """Refuse what a command has no measurement of."""
    for side in sides:
        if side in without:
            raise ArgumentError(f"--against {side} is not measured by this command: leave it out")


def _run(context: typer.Context, options: BenchOptions, json: Path | None, task: Task) -> None:
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
    with BenchModels(options, task.workload) as models:
        measured = tuple(task.measure(models))
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
