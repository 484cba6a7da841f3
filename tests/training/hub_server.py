# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The part of the Hugging Face Hub that uploads and downloads need, on loopback and in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


TOKEN = "hf_test"
USER = "tester"
COMMIT = "0" * 40
Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def do_HEAD(self) -> None:
        self._send_file()

    def do_GET(self) -> None:
        repository = self._repository()
        if "/resolve/" in self.path:
            self._send_file()
        elif "/tree/" in self.path or repository not in self.repositories:
            self._send_error(404, "EntryNotFound" if "/tree/" in self.path else "RepoNotFound")
        else:
            files = [{"rfilename": name} for name in self.repositories[repository]]
            self._send_json({"id": repository, "sha": COMMIT, "siblings": files, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send_error(401, "Unauthorized")
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            self._send_json({"files": [{"path": file["path"], **answer} for file in json.loads(body)["files"]]})
        else:
            assert "/commit/" in self.path, self.path
            self._commit([json.loads(line) for line in body.splitlines()])

    def _repository(self) -> str:
        """Of a path `/api/models/USER/NAME/...`."""
        return "/".join(self.path.split("?")[0].split("/")[3:5])

    def _create(self, request: dict[str, Any]) -> None:
        repository = f"{request['organization'] or USER}/{request['name']}"
        self.repositories.setdefault(repository, {})
        self._send_json({"url": f"http://{self.headers['Host']}/{repository}", "id": repository})

    def _commit(self, operations: list[dict[str, Any]]) -> None:
        repository = self._repository()
        for operation in operations:
            if operation["key"] == "file":
                file = operation["value"]
                self.repositories[repository][file["path"]] = base64.b64decode(file["content"])
        url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
        self._send_json({"commitUrl": url, "commitOid": COMMIT})

    def _send_file(self) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        content = self.repositories.get(repository, {}).get(rest.partition("/")[2])
        if content is None:
            self._send_error(404, "EntryNotFound")
        else:
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send_json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

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
