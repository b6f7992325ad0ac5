"""A local HTTP server that gives one file, well or badly."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WeightsServer:
    """What the server gives, and what it was asked for.

    Parameters
    ----------
    content : bytes
        The file.
    """

    def __init__(self, content):
        self.content = content
        self.etag = '"v1"'
        self.ranges = True
        self.break_after = []  # bytes after which each of the next transfers breaks off
        self.statuses = []  # answers to the next requests, before any file
        self.announces = None  # a size to announce in place of the true one
        self.files = None  # names and checksums that the record of Zenodo lists
        self.requests = []
        self.url = ""

    def answer(self, handler):
        """Answer one request."""
        self.requests.append((handler.path, handler.headers.get("Range")))
        if self.statuses:
            handler.send_response(self.statuses.pop(0))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if handler.path.startswith("/api/records/"):
            body = json.dumps({"files": self.files, "metadata": {"license": {"id": "cc-by-4.0"}}}).encode()
            self.send(handler, 200, body, {})
            return
        start = self.start_of(handler)
        body, size = self.content[start:], len(self.content)
        if start and not body:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{size}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        elif start:
            self.send(handler, 206, body, {"Content-Range": f"bytes {start}-{size - 1}/{size}"})
        else:
            self.send(handler, 200, body, {})

    def start_of(self, handler):
        """Return the first byte to send."""
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        if not self.ranges or asked is None or condition not in (None, self.etag):
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def send(self, handler, status, body, headers):
        """Send a body, or the beginning of it."""
        handler.send_response(status)
        handler.send_header("Content-Length", str(self.announces or len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        broken = self.break_after.pop(0) if self.break_after else len(body)
        handler.wfile.write(body[:broken])
        handler.wfile.flush()
        if broken < len(body):
            handler.connection.close()


@contextmanager
def serving(content):
    """Serve a file on this machine."""
    server = WeightsServer(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *arguments):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
