"""Entry point of a started process, whose standard input is the caller's socket; and of ``python -m``, which runs a daemon.

Knows the first line that it reads there: the caller's import path, as a list. Only the standard library is imported
before that, since the other modules may lie on that path alone.
"""

import json
import os
import sys


def _take_over_import_path() -> None:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # one at a time: the bytes after this line are read elsewhere
        if not byte:
            sys.exit(0)
        line += byte
    sys.path[:] = json.loads(line)


if __name__ == "__main__":
    if __spec__ is None:  # started by its path
        _take_over_import_path()
        from lingualinked.worker.process.forking import main
    else:
        from lingualinked.worker.daemon.command import main

    main()
