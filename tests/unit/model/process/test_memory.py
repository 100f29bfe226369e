"""A process's limit on memory: what probes keep comes on top of it, up to a bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Container

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel refuses memory")

SCRIPT = """
import resource, sys, threading
from lingualinked.model.process import memory

def limit():
    return resource.getrlimit(resource.RLIMIT_DATA)[0]

def take(num_bytes):
    kept.append(bytearray(num_bytes))

kept, (own, other, freed) = [], map(int, sys.argv[1:])
memory.use_one_heap()
memory.limit_memory(memory.private_bytes() + (64 << 20))
before = limit()
for _ in range(4):
    with memory.limit_lifted():
        take(own)
        thread = threading.Thread(target=take, args=(other,))
        thread.start()
        thread.join()
        temporary = bytearray(freed)
        del temporary
print(limit() - before)
"""


def raised_by(own: int, other: int, freed: int) -> int:
    """Return by how many MiB four probes raise the limit, each of which keeps, and takes beside another thread, so many MiB."""
    sizes = [str(each << 20) for each in (own, other, freed)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *sizes], capture_output=True, text=True, check=True)
    return int(done.stdout) >> 20


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((20, 0, 100), range(80, 120)), ((0, 500, 0), [256])],
    ids=["a little is kept", "another thread takes much"],
)
def test_probes_raise_the_limit_by_what_they_keep_up_to_a_bound(
    sizes: tuple[int, int, int], expected: Container[int]
) -> None:
    assert raised_by(*sizes) in expected
