"""Entry of a worker process: ``python -m lingualinked.worker`` with the caller's socket as standard input.

Knows only where the work begins.
"""

from lingualinked.worker.forkserver import main

if __name__ == "__main__":
    main()
