# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The part of the Hugging Face Hub that uploads and downloads need, on loopback and in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


TOKEN = "hf_test"
USER = "tester"
Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def do_HEAD(self) -> None:
        self._send_file()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self._send_file()
        repository = "/".join(self.path.split("?")[0].split("/")[3:5])
        if "/tree/" in self.path or repository not in self.repositories:
            return self._send_error(404, "EntryNotFound" if "/tree/" in self.path else "RepoNotFound")
        files = [{"rfilename": name} for name in self.repositories[repository]]
        self._send_json({"id": repository, "sha": "0" * 40, "siblings": files, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send_error(401, "Unauthorized")
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repository = f"{request['organization'] or USER}/{request['name']}"
            self.repositories.setdefault(repository, {})
            return self._send_json({"url": f"http://{self.headers['Host']}/{repository}", "id": repository})
        if self.path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        repository = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._send_json({"commitUrl": f"http://{self.headers['Host']}/{repository}/commit/0", "commitOid": "0" * 40})

    def _send_file(self) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if name not in self.repositories.get(repository, {}):
            return self._send_error(404, "EntryNotFound")
        content = self.repositories[repository][name]
        self._send(200, content, {"ETag": f'"{hash(content)}"', "X-Repo-Commit": "0" * 40})

    def _send_json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": "0" * 40})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[tuple[str, Repositories]]:
    """Runs the server; yields its address and the files of each repository."""
    repositories: Repositories = {}
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", repositories
        server.shutdown()
        thread.join()
