"""Leaving a process group never hangs, for any scheduling of the threads."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_leaving_a_process_group_never_hangs() -> None:
    """With torch's own destructor it hung within a few dozen times when the ranks shared a core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, str(Path(__file__).parents[1] / "helpers/group_worker.py"), "40", str(port)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
