"""What people read counts rightly and measures in one unit: every text of the package is looked at."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lingualinked as ll
from lingualinked.planning.even import even_plan
from lingualinked.weight_bytes import WeightBytes
from profiles import profile

ROOT = Path(ll.__file__).parent
COUNTED = re.compile(
    r" (answer|arrival|byte|descriptor|device|dimension|element|file|frame|kind|layer|message|migration|model|move|"
    r"parameter|plan|position|process|prompt|request|row|sample|second|server|session|stage|step|tensor|thread|token|"
    r"worker)e?s\b(?!/|\()"
)
WORDS = ("kind", "dims", "numbers")
"""Names of what is no number, or never 1."""
UNITS = re.compile(r"\d (B|KiB|MiB|GiB|TiB)\b")


def texts() -> Iterator[tuple[str, ast.JoinedStr]]:
    """Every f-string of the package, with where it is."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}", node


def is_called(value: ast.expr, name: str) -> bool:
    return isinstance(value, ast.FormattedValue) and ast.unparse(value.value).startswith(f"{name}(")


def test_nouns_are_counted_in_one_place() -> None:
    """A number before a noun is written by `count_text`, or is a fraction."""
    wrong = []
    for where, node in texts():
        for value, following in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(following, ast.Constant):
                continue
            is_fraction = value.format_spec is not None and re.search(r"[fg]", ast.unparse(value.format_spec))
            name = value.value.id if isinstance(value.value, ast.Name) else ""
            if COUNTED.match(str(following.value)) and not is_fraction and not name.isupper() and name not in WORDS:
                wrong.append(where)
    assert not wrong, "\n".join(wrong)


def test_no_text_mixes_bytes_and_larger_units() -> None:
    wrong = [
        where
        for where, node in texts()
        if any(is_called(value, "bytes_text") for value in node.values)
        and ("'byte'" in where or re.search(r"\bbytes\b(?!_text)", re.sub(r"{[^{}]*}", "", where)))
    ]
    assert not wrong, "\n".join(wrong)


def infeasible() -> list[str]:
    """What is said where memory does not suffice, in all its forms."""
    small, large = "30MiB", "11.5GiB"
    weights = WeightBytes(layers=(1_500_000_000,) * 8, prologue=2_000_000_000, epilogue=2_000_000_000)
    said = []

    def refused(make: object) -> None:
        assert callable(make)
        with pytest.raises(ll.InfeasiblePlanError) as caught:
            make()
        said.append(str(caught.value))

    def device(name: str, memory: str | None) -> ll.Device:
        return ll.Device(name=name, memory=memory)

    refused(lambda: even_plan(weights, [device("a", small)]))
    refused(lambda: even_plan(weights, [device("a", "8GiB"), device("b", "7GiB")]))
    refused(lambda: even_plan(weights, [device("a", "1.4GiB"), device("b", large)]))
    refused(lambda: even_plan(WeightBytes(layers=(1,), prologue=0, epilogue=0), [device("a", None)] * 2))
    refused(lambda: ll.solve(profile(device("a", small), device("b", small))))
    refused(lambda: ll.solve(profile(device("a", "105MiB")), workload=ll.Workload(batch_size=999)))
    refused(lambda: ll.baseline(profile(device("a", small), device("b", None)), "even"))
    return said


def test_memory_errors_speak_in_one_unit() -> None:
    for text in infeasible():
        assert not re.search(r"\bbytes?\b|\d{7}", text), text
        assert re.search(r" 1 \w+s\b", text) is None, text
    assert sum(UNITS.search(text) is not None for text in infeasible()) >= 6
