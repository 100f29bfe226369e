"""Ctrl-C ends a command with the status of an interrupt, and without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process


def test_an_interrupt_ends_the_demo() -> None:
    command = [sys.executable, "-c", "from lingualinked.cli import app; app()", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Sample model")  # a cluster is started next
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
