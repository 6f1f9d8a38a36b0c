"""The part of the Hugging Face hub's HTTP interface that an upload uses, on 127.0.0.1; it keeps what it receives."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_planted_token"


class FakeHub:
    """Repositories in memory; every request must have the token.

    Args:
        refused: Namespace that the token may not write to.
    """

    def __init__(self, refused: str = "others") -> None:
        self.refused = refused
        self.visibility: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.fail_commits = False
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                allowed = self.headers["Authorization"] == f"Bearer {TOKEN}" or self.command == "PUT"
                status, reply = hub.answer(self.command, self.path, content) if allowed else (401, {})
                body = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, Any]:
        """Status and JSON body for a request."""
        if method == "PUT":
            self._blobs[path.rpartition("/")[2]] = content
            return 200, {}
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(each) for each in json.loads(content)["objects"]]}
        repo = "/".join(path.split("/")[3:5]).partition("?")[0]
        if "/preupload/" in path:
            return 200, {"files": [self._mode(each) for each in json.loads(content)["files"]]}
        if "/commit/" in path:
            return self._commit(repo, content)
        found = {"id": repo, "private": self.visibility.get(repo) != "public", "sha": "0" * 40, "siblings": []}
        return (200, found) if repo in self.visibility else (404, {})

    def _create(self, request: Any) -> tuple[int, Any]:
        owner = request["organization"] or "me"
        repo = f"{owner}/{request['name']}"
        if owner == self.refused:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        created = repo not in self.visibility
        self.visibility.setdefault(repo, request["visibility"])
        return (200 if created else 409), {"name": repo, "url": f"{self.url}/{repo}"}

    def _place(self, blob: Any) -> Any:
        return {**blob, "actions": {"upload": {"href": f"{self.url}/blobs/{blob['oid']}"}}}

    def _mode(self, file: Any) -> Any:
        mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, repo: str, content: bytes) -> tuple[int, Any]:
        if self.fail_commits:
            return 400, {"error": "too large"}
        files = self.files.setdefault(repo, {})
        for operation in map(json.loads, content.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                blob = self._blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                files[value["path"]] = blob
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40}
