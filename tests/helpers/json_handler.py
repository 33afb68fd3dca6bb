"""What the stand-in servers have in common: answers in JSON, no log."""

import json
from http.server import BaseHTTPRequestHandler


class JsonHandler(BaseHTTPRequestHandler):
    """Answers by `say` (JSON) or `send` (bytes)."""

    def say(self, what, status: int = 200) -> None:
        """Answer with `what` as JSON."""
        self.send(json.dumps(what).encode(), status)

    def send(self, body: bytes, status: int) -> None:
        """Answer with bytes as they are."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
