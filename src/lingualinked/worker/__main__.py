"""Entry of a started process, with the caller's socket as standard input.

Knows the first line that it reads there: the caller's import path, as a list. Nothing but the standard library is
imported before that, for the rest may be found there alone.
"""

import json
import os
import sys


def _take_over_import_path() -> None:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # one at a time: what follows is for others to read
        if not byte:
            sys.exit(0)
        line += byte
    sys.path[:] = json.loads(line)


if __name__ == "__main__":
    _take_over_import_path()
    from lingualinked.worker.forkserver import main

    main()
