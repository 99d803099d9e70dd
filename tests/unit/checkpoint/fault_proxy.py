"""A proxy before an S3 server that fails on purpose, in an order that a seed decides.

Each request draws one of `FAULTS` or none: an error answer (500, 503) before the server hears of it, a connection
that is reset, an answer that is lost after the server acted on the request, an answer in small pieces, one that breaks
off in the middle.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("500", "503", "reset", "lost", "slow", "short")


class FaultProxy:
    """Serves on a free port of this machine, from `start` to `stop`.

    Attributes:
        counts: How often each fault was played.
        share: Share of requests that get one; may be changed at any time.
    """

    def __init__(self, upstream: tuple[str, int], *, seed: int, share: float = 0.25):
        self.upstream, self.share = upstream, share
        self.counts = dict.fromkeys(FAULTS, 0)
        self._random, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """`HOST:PORT`."""
        return "{}:{}".format(*self._server.server_address[:2])

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def draw(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.share:
                return None
            fault = self._random.choice(FAULTS)
            self.counts[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def _serve(self) -> None:
        body = self._body()
        fault = self.proxy.draw()
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>InternalError</Code></Error>" if fault == "500" else b"")
            return
        if fault == "reset":
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        connection.request(self.command, self.path, body=body, headers=dict(self.headers))
        answer = connection.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        connection.close()
        if fault == "lost":
            self._reset()
            return
        self._answer(answer.status, headers, content, fault=fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, fault: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "short" and len(content) > 1:
            self.wfile.write(content[: len(content) // 2])
            self._reset()
            return
        step = max(1, len(content) // 50) if fault == "slow" else max(1, len(content))
        for at in range(0, len(content), step):
            self.wfile.write(content[at : at + step])
            self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # a reset, not an orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None:
        return None
