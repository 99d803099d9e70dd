"""An S3 server in a process of its own, for the tests that save to one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

KEYS = {"S3_ACCESS_KEY_ID": "testing", "S3_SECRET_ACCESS_KEY_ID": "testing"}
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("at", *server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def running() -> Iterator[tuple[str, int]]:
    """Its host and port; the test is skipped where moto is not installed."""
    pytest.importorskip("moto.server", reason="moto with flask is not installed")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        said = next(line.split() for line in process.stdout if line.startswith("at "))
        yield said[1], int(said[2])
        process.stdin.close()
