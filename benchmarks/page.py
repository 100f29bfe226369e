"""``python -m benchmarks page`` and ``measure``: the tables of docs/performance.md, and the reports that they are made from.

Knows the page, its reports and the commands that write them; measures nothing itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from lingualinked.cli.bench.measurement import Report
from lingualinked.console import new_console
from lingualinked.errors import ArgumentError
from lingualinked.quantities import seconds_text

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
REPORTS = PAGE.parent / "performance"

_PROGRAM = Path(sys.executable).with_name("lingualinked")
_LLAMA_CPP = "llama.cpp"
_UNCUT = "uncut-1,uncut-2"

RUNS = {
    "decode-160m": f"decode 160m --plan even --rows 1 --rows 16 --new-tokens 64 --against {_UNCUT},one-step,{_LLAMA_CPP}",
    "decode-1b": f"decode 1b --plan even --rows 1 --rows 16 --new-tokens 24 --against uncut-2,{_LLAMA_CPP} --repeats 2",
    "decode-bloom": "decode bloom-560m --prompt-tokens 64 --new-tokens 32 --against lingualinked --repeats 2",
    "offload-bloom": "decode bloom-560m --new-tokens 8 --dtype float32 --against accelerate --repeats 1",
    "prefill-160m": f"prefill 160m --plan even --tokens 512 --tokens 1024 --against {_UNCUT},{_LLAMA_CPP}",
    "prefill-1b": f"prefill 1b --plan even --tokens 512 --tokens 1024 --against uncut-2,{_LLAMA_CPP} --repeats 1",
    "throughput-160m": f"throughput 160m --plan even --against uncut-2,{_LLAMA_CPP}",
    "throughput-1b": f"throughput 1b --plan even --new-tokens 16 --against uncut-2,{_LLAMA_CPP} --repeats 2",
    "throughput-slow": "throughput 160m --plan even --devices 4 --slowdown 4 --sessions 8 --against none --repeats 2",
    "load-160m": "load 160m --plan even --repeats 1",
    "overhead": "overhead --steps 2000",
    "memory": "memory sample",
}
"""The command that writes each report of the page."""

_BLOCK = re.compile(r"(<!-- report: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def run_measure(names: list[str], llama_cpp: Path | None) -> None:
    """Run the commands of some reports, or of all, and make the tables anew; without llama.cpp's folder, it is left out."""
    if unknown := set(names) - set(RUNS):
        raise ArgumentError(f"there is no report {min(unknown)!r}: choose from {', '.join(RUNS)}")
    REPORTS.mkdir(exist_ok=True)
    console = new_console()
    failed = []
    for name in names or RUNS:
        command = [str(_PROGRAM), "bench", *_arguments(RUNS[name], llama_cpp)]
        began_s = time.monotonic()
        done = subprocess.run([*command, "--json", str(REPORTS / f"{name}.json")], check=False)
        console.print(f"{name}: {seconds_text(time.monotonic() - began_s)}", highlight=False)
        if done.returncode != 0:
            failed.append(name)
    run_page()
    if failed:
        raise ArgumentError(f"not measured, as said above: {', '.join(failed)}")


def run_page() -> None:
    """Write the tables of the page anew, from the reports that are kept beside it."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """Return the page with the table of each report between its marks."""
    return _BLOCK.sub(lambda block: block[1] + table_of(block[2]) + block[4], page)


def table_of(name: str) -> str:
    """Return the table of a report in Markdown, with its command, its machine and what was noted."""
    path = REPORTS / f"{name}.json"
    if not path.is_file():
        return f"\nNot measured yet: `python -m benchmarks measure {name}`.\n\n"
    rows = Report.from_json(path.read_bytes()).to_rows()
    # Columns that no row fills are left out.
    kept = [index for index in range(len(rows.columns)) if index == 0 or any(row[index].strip() for row in rows.rows)]
    lines = [[rows.columns[index] for index in kept], *([row[index].strip() for index in kept] for row in rows.rows)]
    lines.insert(1, ["---"] * len(kept))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(rows.notes)
    return f"\n`{rows.title}`\n\n{table}\n\n{notes}\n\n"


def _arguments(run: str, llama_cpp: Path | None) -> list[str]:
    """Return the arguments of a run, with llama.cpp's folder or without llama.cpp."""
    if llama_cpp is None:
        return run.replace(f",{_LLAMA_CPP}", "").split()
    words = run.split()
    return [*words, "--llama-cpp", str(llama_cpp)] if _LLAMA_CPP in run else words
