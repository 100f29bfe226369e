"""Run pieces of code that standard input names, a line of JSON each; print what each came to.

Runs on a host of a network test; see `network.machines.Caller`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback

import lingualinked as ll

scope: dict[str, object] = {"ll": ll}
for line in sys.stdin:
    asked = json.loads(line)
    scope.update(asked["values"], result=None)
    began_s = time.monotonic()
    try:
        exec(asked["code"], scope)
        said = {"result": scope["result"]}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        said = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    said["seconds"] = time.monotonic() - began_s
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
