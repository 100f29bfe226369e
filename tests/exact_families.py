"""``python tests/exact_families.py FAMILY ...``: bfloat16 models, wide enough for packed weights, cut and uncut.

Run in a process of its own, under environment variables that choose instruction sets. Prints each family whose logits differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import families
from conversations import Cut, Whole, beam_and_back, greedy, load_stages, spec_of
from lingualinked.model.exact.packed_linear import PackedLinear

WIDTH = 128


def widen() -> None:
    """Make the tiny models' layers so wide that most weights are packed."""
    families._COMMON["hidden_size"] = WIDTH
    for _, arguments in families.FAMILIES.values():
        arguments.pop("hidden_size", None)
        for name in {"intermediate_size", "ffn_dim"} & arguments.keys():
            arguments[name] *= 3
        if arguments.get("word_embed_proj_dim") == 32:
            arguments["word_embed_proj_dim"] = WIDTH


def differs(family: str, folder: Path) -> tuple[bool, int]:
    """Say whether a logit of the stages differs from the unsharded model's, and how many weights were packed."""
    model = families.reference(families.save_tiny(family, torch.bfloat16, folder))
    stages = load_stages(spec_of(folder), 2, 4)
    ours = [*greedy(Cut(stages), 4), *beam_and_back(Cut(stages, records_past=True))]
    theirs = [*greedy(Whole(model), 4), *beam_and_back(Whole(model, records_past=True))]
    num_packed = sum(isinstance(module, PackedLinear) for stage in stages for module in stage._model.modules())
    return not all(map(torch.equal, ours, theirs)), num_packed


def main() -> None:
    """Compare the families named, or all."""
    torch.set_num_threads(1)
    widen()
    names = sys.argv[1:] or list(families.FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: differs(name, Path(folder) / name) for name in names}
    different = [name for name, (is_different, _) in found.items() if is_different]
    num_packed = sum(number for _, number in found.values())
    sys.stdout.write(f"{torch.backends.cpu.get_cpu_capability()}, {num_packed} weights packed\n")
    sys.stdout.write(" ".join(["different:", *different]) + "\n")


if __name__ == "__main__":
    main()
