"""Real servers on this machine: a web server that fails on command, and an S3 server."""

import os
import socket
import struct
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

STALL_S = 3.0


class WebServer:
    """Serves `files`, a dict from path to bytes.

    Each answer takes the next of `faults`; once there are none left, answers are right. A fault is
    ("status", code, headers), ("stall" | "reset" | "truncate", bytes sent before it), ("flip",
    offset), ("replace", path, content), which changes a file once half of it is sent, or None.
    """

    def __init__(self):
        self.files = {}
        self.faults = deque()
        self.always = None  # a fault of every answer
        self.broken = {}  # path -> a fault of every answer for it
        self.knows_ranges = True
        self.knows_tags = True
        self.sends_length = True
        self.bytes_per_part = 1 << 16
        self.part_wait_s = 0.0
        self.requests = []  # (path with query, Range, Authorization)
        self.sent = []  # bytes of each answer with content that has ended
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Print nothing: connections are reset on command."""


class _Handler(BaseHTTPRequestHandler):
    owner = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        owner = self.owner
        path = unquote(self.path.partition("?")[0])
        wanted = self.headers.get("Range")
        owner.requests.append((self.path, wanted, self.headers.get("Authorization")))
        fault = owner.always or owner.broken.get(path)
        fault = fault or (owner.faults.popleft() if owner.faults else None) or ("none",)
        if fault[0] == "status":
            self.send_response(fault[1])
            for name, value in fault[2].items():
                self.send_header(name, value)
            self.end_headers()
            return
        if path not in owner.files:
            self.send_error(404)
            return
        content = owner.files[path]
        tag = f'"{hash(content)}"'
        if fault[0] == "flip":
            content = bytearray(content)
            content[fault[1]] ^= 1
            content = bytes(content)
        start, stop = self._span(wanted, tag, len(content))
        if start is None:
            self.send_response(200)
            start, stop = 0, len(content)
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if owner.sends_length:
            self.send_header("Content-Length", str(stop - start))
        if owner.knows_tags:
            self.send_header("ETag", tag)
        self.end_headers()
        self.num_sent = 0
        try:
            self._send(content[start:stop], fault)
        finally:
            owner.sent.append(self.num_sent)

    do_HEAD = do_GET

    def _span(self, wanted, tag, size):
        if wanted is None or not self.owner.knows_ranges:
            return None, None
        if self.owner.knows_tags and self.headers.get("If-Range", tag) != tag:
            return None, None
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1 if last else size, size)

    def _send(self, content, fault):
        kind = fault[0]
        if kind == "replace":
            self._write(content[: len(content) // 2])
            self.owner.files[fault[1]] = fault[2]
            return
        if kind not in ("stall", "reset", "truncate"):
            self._write(content)
            return
        self._write(content[: fault[1]])
        if kind == "stall":
            time.sleep(STALL_S)
        elif kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.wfile.close()
            self.connection.close()

    def _write(self, content):
        try:
            for at in range(0, len(content), self.owner.bytes_per_part):
                part = content[at : at + self.owner.bytes_per_part]
                self.wfile.write(part)
                self.wfile.flush()
                self.num_sent += len(part)
                if self.owner.part_wait_s:
                    time.sleep(self.owner.part_wait_s)
        except OSError:
            pass  # the client has closed the connection, as it may


@contextmanager
def web_server():
    server = WebServer()
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3_server(bucket):
    """An S3 server with one empty bucket, as a file system of pyarrow.

    While it runs the environment names it.
    """
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        system = fs.S3FileSystem(
            endpoint_override=settings["AWS_ENDPOINT_URL"], allow_bucket_creation=True
        )
        system.create_dir(bucket)
        yield system
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
