"""``lingualinked cache``: shows and removes the weights that this user's workers have fetched from other hosts.

Knows typer and the cache's folder; fetches nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from lingualinked.console import new_console
from lingualinked.quantities import bytes_text
from lingualinked.tables import Rows

if TYPE_CHECKING:
    from lingualinked.model.weight_files.weight_cache import CacheEntry, WeightCache

app = typer.Typer(
    name="cache",
    help="Show or remove the weights that this machine's daemon has fetched from its callers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_files() -> None:
    """Show the models in the cache, the last used first."""
    cache = _open()
    models: dict[str, list[CacheEntry]] = {}
    for entry in cache.entries():
        models.setdefault(entry.model, []).append(entry)
    typer.echo(f"{cache.folder}: {bytes_text(cache.disk_bytes())}")  # unbroken, so that the path can be copied
    new_console().print(
        Rows(
            title="",
            columns=("model", "files", "held", "of", "on disk", "last used"),
            rows=[_row(model, entries) for model, entries in models.items()],
        )
    )


@app.command()
def clear() -> None:
    """Remove all weights that no worker is loading or serving."""
    cache = _open()
    freed = cache.clear()
    left = cache.disk_bytes()
    typer.echo(f"Freed {bytes_text(freed)} in {cache.folder}" + (f"; {bytes_text(left)} are in use" if left else ""))


def _open() -> WeightCache:
    from lingualinked.model.weight_files.weight_cache import WeightCache, default_cache_folder  # only here

    return WeightCache(default_cache_folder())


def _row(model: str, entries: list[CacheEntry]) -> tuple[str, ...]:
    return (
        "".join(each if each.isprintable() else "?" for each in model),  # a caller on another host has named it
        str(len(entries)),
        bytes_text(sum(entry.held_bytes for entry in entries)),
        bytes_text(sum(entry.num_bytes for entry in entries)),
        bytes_text(sum(entry.disk_bytes for entry in entries)),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(max(entry.last_used_s for entry in entries))),
    )
