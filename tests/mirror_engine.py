"""An engine that answers with the head of the request it got, and with headers that no client should see.

``python -m tests.mirror_engine PORT``. A body with `"fail"` gets that text back, with status 500.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LEAKY = {
    "Location": "http://127.0.0.1:9/elsewhere",
    "Set-Cookie": "engine=1",
    "X-Hop": "1",
    "Access-Control-Allow-Origin": "*",
    "Keep-Alive": "timeout=5",
    "X-Fine": "1",
}


class Mirror(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "engine/1"

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fields = json.loads(body)
        if "fail" in fields:
            self.answer(500, fields["fail"])
            return
        self.answer(200, {"line": self.requestline, "headers": [[n, v] for n, v in self.headers.items()]})

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **LEAKY}.items():
            self.send_header(name, text)
        self.send_header("Connection", "X-Hop")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Mirror).serve_forever()
