"""A server that answers huggingface_hub as the hub does, as far as downloads and commits need it.

    with local_hub() as hub:
        hub.files["user/name"] = {"config.json": b"{}"}
        hub.environment(tmp_path)              # variables for a process that uses it

It keeps everything in memory. The token is ``TOKEN``; private repositories need it, and so does every change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from served import served

TOKEN = "hf_" + "t" * 34
SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class LocalHub(ThreadingHTTPServer):
    """The repositories, and the requests so far as (method, path, whether the right token came)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.uploads: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.requests: list[tuple[str, str, bool]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that uses this hub alone."""
        plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), **plain}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: Any) -> None:
        """Writes nothing."""

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.server.requests.append((self.command, self.path, known))
        path = self.path.split("?")[0]
        changes = self.command in ("POST", "PUT") and not path.startswith("/upload/") and path != "/api/validate-yaml"
        if changes and not known:
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES.items():
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return method(self, body, **found.groupdict())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def is_visible(self, repo: str) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return repo in self.server.files and (known or not self.server.private.get(repo))

    def whoami(self, body: bytes) -> None:
        self.answer(200, {"type": "user", "name": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or "user"
        repo = f"{owner}/{asked['name']}"
        if repo in self.server.files:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
            )
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.files[repo], self.server.private[repo] = {}, bool(private)
        return self.answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def info(self, body: bytes, repo: str) -> None:
        if not self.is_visible(repo):
            return self.missing("RepoNotFound")
        names = [{"rfilename": name} for name in self.server.files[repo]]
        private = self.server.private.get(repo, False)
        return self.answer(200, {"id": repo, "modelId": repo, "sha": SHA, "private": private, "siblings": names})

    def tree(self, body: bytes, repo: str, **_: str) -> None:
        if not self.is_visible(repo):
            return self.missing("RepoNotFound")
        files = self.server.files[repo].items()
        return self.answer(200, [{"type": "file", "path": name, "size": len(data), "oid": SHA} for name, data in files])

    def resolve(self, body: bytes, repo: str, name: str) -> None:
        if not self.is_visible(repo):
            return self.missing("RepoNotFound")
        data = self.server.files[repo].get(name)
        if data is None:
            return self.missing("EntryNotFound")
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(200, data, X_Repo_Commit=SHA, ETag=f'"{etag}"')

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if repo not in self.server.files:
            return self.missing("RepoNotFound")
        names = [each["path"] for each in json.loads(body)["files"]]
        kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        return self.answer(
            200, {"files": [{"path": name, "uploadMode": kind, "shouldIgnore": False} for name, kind in kinds.items()]}
        )

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/upload/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the bytes have another SHA-256"})
        self.server.uploads[oid] = body
        return self.answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo][value["path"]] = self.server.uploads[value["oid"]]
        self.answer(200, {"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/{repo}/commit/{SHA}"})


ROUTES: dict[str, Any] = {
    "HEAD /": lambda self, body: self.answer(200),
    "GET /api/whoami-v2": Handler.whoami,
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    rf"GET /api/models/{REPO}(?:/revision/[\w.-]+)?": Handler.info,
    rf"GET /api/models/{REPO}/tree/[\w.-]+": Handler.tree,
    rf"POST /api/models/{REPO}/preupload/main": Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /upload/(?P<oid>\w+)": Handler.upload,
    rf"POST /api/models/{REPO}/commit/main": Handler.commit,
    rf"(?:GET|HEAD) /{REPO}/resolve/[\w.-]+/(?P<name>.+)": Handler.resolve,
}


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running hub on a free port of the loopback interface."""
    hub = LocalHub()
    with served(hub):
        yield hub
