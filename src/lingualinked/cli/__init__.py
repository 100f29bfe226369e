"""The command line: ``lingualinked demo | discover | generate | keys | cache | plan | bench | trace | doctor | worker``.

Parses options and prints results; the library that users import does the work.
"""

from lingualinked.cli.app import app

__all__ = ["app"]
