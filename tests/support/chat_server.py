"""A small chat server on this machine that answers as told, in OpenAI's format."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def event(text=None, **choice) -> str:
    """One server-sent event with a piece of text."""
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, **choice}]}) + "\n\n"


GOOD = [event("A red "), ": keep-alive\n\n", event("cat \u732b"), event(None, finish_reason="stop"), "data: [DONE]\n\n"]


@contextlib.contextmanager
def running_chat_server(*replies) -> Iterator[tuple[str, list]]:
    """(url, requests): each reply is (status, headers, pieces of the body, pause before each); the last one repeats.

    A request is (path, headers, body); "gone" follows where the caller left before the end.
    """
    requests, rest = [], list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, dict(self.headers), json.loads(body)))
            status, headers, pieces, pause = rest.pop(0) if len(rest) > 1 else rest[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for piece in pieces:
                    time.sleep(pause)
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
            except OSError:  # the caller has gone
                requests.append("gone")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/", requests
    finally:
        server.shutdown()
        server.server_close()
