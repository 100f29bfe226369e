"""``python -m benchmarks NAME``: one benchmark, with its options.

Knows typer; each benchmark lies in a module of its own, imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="benchmarks",
    help="Measure the library's parts, and its plans against what was predicted and proven. Models are measured by `lingualinked bench`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Devices = Annotated[
    str, typer.Option("--devices", "-d", help="A number of local CPU workers, or a cluster file (TOML).")
]


@app.command()
def start(
    devices: Devices = "3",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
) -> None:
    """Time from nothing to the first token, against one plain process; and what planning adds."""
    from benchmarks.start import run_planned_start, run_start
    from lingualinked.cli.devices_option import read_devices

    asked = read_devices(devices)
    run_start(asked.devices, asked.links, repeats)
    run_planned_start(asked.devices, asked.links, repeats)


@app.command()
def measure(
    name: Annotated[list[str] | None, typer.Argument(help="Reports of docs/performance/; all without it.")] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", help="Folder of llama.cpp's programs; without it, llama.cpp is left out."),
    ] = None,
) -> None:
    """Measure what docs/performance.md shows, about 20 minutes on a quiet machine, and make its tables anew."""
    from benchmarks.page import run_measure

    run_measure(name or [], llama_cpp)


@app.command()
def page() -> None:
    """Make the tables of docs/performance.md anew, from the reports in docs/performance/."""
    from benchmarks.page import run_page

    run_page()


@app.command()
def watching(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 10,
) -> None:
    """Decode speed of two workers with one thread each, watched for rebalancing or not."""
    from benchmarks.watching import run_watching

    run_watching(context, repeats)


@app.command()
def hops(
    size: Annotated[list[int] | None, typer.Option(help="Bytes of a tensor.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs; of short ones, 20 times as many.")] = 5,
    accelerator: Annotated[str, typer.Option(help="Where tensors and stages are, such as cuda:0.")] = "cpu",
) -> None:
    """Time a hop between processes, a prefill and decoding: through shared memory, and over a socket."""
    from benchmarks.hops import run_hops

    run_hops(tuple(size or (2**power for power in (14, 16, 18, 20, 23))), repeats, accelerator)


@app.command()
def fetching(
    sources: Annotated[
        int, typer.Option(min=1, help="The most sources: the caller, and daemons that have the weights.")
    ] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Loads from each number of sources.")] = 3,
) -> None:
    """Weights that travel to a daemon from one source or several, against a copy of the files; time of the processors."""
    from benchmarks.fetching import run_fetching

    run_fetching(sources, repeats)


@app.command()
def network_hops(
    size: Annotated[list[int] | None, typer.Option(help="Bytes of a tensor.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Twenty hops each.")] = 5,
) -> None:
    """Time a hop over TCP between network namespaces against ipc, and CURVE against plain ZeroMQ. Needs root."""
    from benchmarks.network_hops import run_network_hops

    run_network_hops(tuple(size or (2_000, 64 << 10, 8 << 20)), repeats)


@app.command()
def hooks(
    repeats: Annotated[int, typer.Option(min=1, help="40 decode steps and 4 prefills each of every case.")] = 5,
) -> None:
    """Time what hooks add to a step, ordinary ones and those that say what they want, beside a hop between processes."""
    from benchmarks.hooks import run_hooks

    run_hooks(repeats)


@app.command()
def ipc(
    size: Annotated[list[int] | None, typer.Option(help="Bytes of a tensor.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Processes started, of 200 exchanges each.")] = 3,
    accelerator: Annotated[str, typer.Option(help="Where the memory is.")] = "cuda:0",
) -> None:
    """Time the bare exchange of memory that two processes on one GPU share, for comparison with `hops`."""
    from benchmarks.ipc import run_ipc

    run_ipc(tuple(size or (2**power for power in (13, 18, 23))), repeats, accelerator)


@app.command()
def instruments(
    context: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Pairs of decode steps of each row.")] = 200,
) -> None:
    """Time a decode step of two workers with captures and interventions at every layer, against the same step without."""
    from benchmarks.instruments import run_instruments

    run_instruments(context, steps)


@app.command()
def gpu(
    shape: Annotated[str, typer.Option(help="llama-1b, llama-8b or tiny.")] = "llama-1b",
    accelerator: Annotated[str, typer.Option(help="Where both sides compute; cpu to try the benchmark.")] = "cuda:0",
    row: Annotated[list[str] | None, typer.Option(help="Of the table's rows, by name; all without it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are decoded at once.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to decode in each run.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, of one run of each row.")] = 5,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no row and no round begins.")] = 600.0,
) -> None:
    """Decode speed of two workers on one GPU, against one process: eager, compiled, and replaying a CUDA graph."""
    from benchmarks.gpu import ROWS, SHAPES, run_gpu

    rows = tuple(row or ROWS)
    if shape not in SHAPES or not set(rows) <= set(ROWS):
        raise typer.BadParameter(f"choose a shape from {', '.join(SHAPES)}, and rows from {', '.join(ROWS)}")
    run_gpu(
        shape,
        "cuda:0" if accelerator == "cuda" else accelerator,
        rows,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        time_limit_s=time_limit,
    )


@app.command()
def predict(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each plan.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 64,
) -> None:
    """Predicted against measured and simulated speed on emulated clusters, and the solved plan against others."""
    from benchmarks.predict import run_predict

    run_predict(repeats, new_tokens, prompt_tokens)


@app.command()
def planner(repeats: Annotated[int, typer.Option(min=1, help="Random problems of each size.")] = 5) -> None:
    """Time the planner, and compare its plans with the proven bound."""
    from benchmarks.planner import run_planner

    run_planner(repeats)


@app.command()
def soak(
    migrations: Annotated[int, typer.Option(min=1, help="Random migrations.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the schedule.")] = 0,
) -> None:
    """Move layers at random while the bundled model answers: no token may change, nothing may be lost."""
    from benchmarks.soak import run_soak

    run_soak(migrations, seed)


@app.command()
def rebalance(
    sessions: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each model once layers have moved.")] = 3,
) -> None:
    """One of three devices becomes four times slower: tokens/s with and without rebalancing, and of a fresh plan."""
    from benchmarks.rebalance import run_rebalance

    run_rebalance(sessions, new_tokens, repeats)


@app.command()
def products(
    outputs: Annotated[int, typer.Option(min=1, help="To compare for each shape, dtype and bias.")] = 2_000_000,
    sample: Annotated[str, typer.Option(help="Compare a few shapes only, drawn by this text.")] = "",
) -> None:
    """Compare products of few rows, and attention of few tokens, with torch's, bit for bit, in the shapes of real models."""
    from benchmarks.attention import run_attention
    from benchmarks.products import run_products

    run_products(outputs, sample)
    run_attention(outputs, sample)


if __name__ == "__main__":
    app()
