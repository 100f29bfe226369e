"""The command line: ``lingualinked demo | generate | plan | bench | trace | doctor``.

Knows how to ask and to print; the work is done by the library that users import.
"""

from lingualinked.cli.app import app

__all__ = ["app"]
