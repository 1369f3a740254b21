"""Leaving a process group never hangs, however the threads are scheduled."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_group_that_is_left_hangs_nobody() -> None:
    """torch's own destructor did, within some tens of times, when the ranks share a core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, str(Path(__file__).with_name("group_worker.py")), "40", str(port)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
