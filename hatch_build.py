"""Compiles the kernels when the project is installed or a wheel is built, by the compiler in the build's requirements.

Knows one processor family; elsewhere nothing is compiled, and products are torch's own.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/lingualinked/kernels"
PROCESSOR = "x86_64_v4+avx512bf16"  # a kernel's caller looks for what it needs of it
OPTIONS = {
    **{
        name: ["-mcpu=x86_64_v3", "-ffp-contract=off"]
        for name in ("float_rows", "gated", "half_rows", "norm", "rotary", "sequence")
    },
    "bfloat_rows": ["-mcpu=x86_64_v4", "-ffp-contract=off"],
}
FLAGS = [
    "-target", "x86_64-linux-musl", "-O3", "-shared", "-fPIC", "-s",
    "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror",
]  # fmt: skip


class KernelBuildHook(BuildHookInterface[Any]):
    """Adds compiled kernels to a wheel, and to the source folder of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile what was not compiled yet, and say which platform the wheel is for."""
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            compile_kernels(Path(self.root))
            build_data["artifacts"].append(f"/{FOLDER}/*.so")
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-manylinux_2_17_x86_64"  # they call no C library


def compile_kernels(root: Path) -> None:
    """Compile each source that was not compiled as it is now."""
    for source in (root / FOLDER).glob("*.c"):
        library = library_path(source)
        if library.exists():
            continue
        options = [f"-mcpu={PROCESSOR}", *OPTIONS.get(source.stem, []), *FLAGS]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *options, "-o", library, source], check=True)
        for old in source.parent.glob(f"lib{source.stem}*.so"):
            if old != library:
                old.unlink()


def library_path(source: Path) -> Path:
    """Return where the package looks for what is compiled from a source: `native.library_path`."""
    files = (source, *sorted(source.parent.glob("*.h")))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return source.with_name(f"lib{source.stem}-{digest[:12]}.so")


if __name__ == "__main__":
    compile_kernels(Path(__file__).parent)
