"""An HTTP server on 127.0.0.1 whose answers a function decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-planted-2718"


@dataclass
class Reply:
    """An answer: `body` is sent as JSON, or as it is if it is bytes; `drop` closes the connection instead."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False


class Loopback:
    """Answers the request of a path and body with `script(path, body)`; it records all of them.

    Args:
        script: Called in a thread per connection; it may block.
        key: API key that requests must have, or None.
    """

    def __init__(self, script: Callable[[str, Any], Reply], key: str | None = None) -> None:
        self.script, self.key = script, key
        self.paths: list[str] = []
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.outstanding = self.max_outstanding = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def do_POST(self) -> None:
                server.serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["Content-Length"]))
        if not content:  # the client timed out or was killed
            raise ConnectionResetError
        body = json.loads(content)
        with self.lock:
            self.paths.append(handler.path)
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.outstanding += 1
            self.max_outstanding = max(self.max_outstanding, self.outstanding)
        try:
            if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
                reply = Reply({"error": {"message": f"wrong key {handler.headers['Authorization']}"}}, 401)
            else:
                reply = self.script(handler.path, body)
        finally:
            with self.lock:
                self.outstanding -= 1
        if reply.drop:
            handler.connection.close()
            raise ConnectionResetError
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def completion(text: str | None, finish: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 5) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return Reply({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
