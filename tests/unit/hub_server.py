"""A small server of the hub's layout: what `huggingface_hub` asks for to download data sets and models, and to upload.

python -m tests.unit.hub_server FOLDER PORT     serves FOLDER/{datasets,models}/<owner>/<name>/...
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 100  # bytes; files from here on are stored as LFS files on the "content server"


class HubServer(ThreadingHTTPServer):
    """Data sets by name, each of one commit, and the faults that a test asks for.

    Attributes:
        data_sets: name -> (commit, file name -> content).
        cuts: for the coming downloads, after how many bytes the connection breaks.
        refused: downloads answered with 503 from now on.
        with_sizes: whether the listing has sizes and checksums; some mirrors' have not.
        served: content that is sent instead, by file name.
        ranges: the `Range` header of every download, "" without one.
        models: name -> file name -> content, of what was uploaded, and what can be downloaded.
        token: that uploads must bring; None: whoever.
        objects: LFS content by SHA-256.
        failures: uploads of content answered with 500 from now on.
        plain: path -> content, of files of no repository, as a storage bucket serves them.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.data_sets: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.cuts: list[int] = []
        self.refused = False
        self.with_sizes = True
        self.served: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.models: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None
        self.objects: dict[str, bytes] = {}
        self.failures = 0
        self.plain: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds or replaces a data set; returns its commit."""
        commit = hashlib.sha1(repr((repo, files)).encode()).hexdigest()
        self.data_sets[repo] = (commit, files)
        return commit

    def add_folder(self, folder: Path) -> None:
        """Adds what lies in `{datasets,models}/<owner>/<name>/`."""
        for root in sorted(folder.glob("*/*/*")):
            repo = "/".join(root.parts[-2:])
            files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            if root.parts[-3] == "datasets":
                self.add(repo, files)
            else:
                self.models[repo] = files

    def repository(self, kind: str, repo: str) -> tuple[str, dict[str, bytes]]:
        """(commit, files)."""
        if kind == "datasets":
            return self.data_sets[repo]
        files = self.models[repo]
        return hashlib.sha1(repr((repo, sorted(files))).encode()).hexdigest(), files


@contextmanager
def serving() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if self.server.token not in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self._json(401, {"error": "Invalid credentials"})
        elif path == "/graphql":  # W&B's login asks who it is
            viewer = {
                "id": "1",
                "username": "user",
                "entity": "user",
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
            self._json(200, {"data": {"viewer": viewer}})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [file | {"uploadMode": _mode(file), "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._json(200, {"files": files})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.server.url}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._json(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._send(404)

    def do_PUT(self) -> None:
        body = self._body()
        if self.server.failures:
            self.server.failures -= 1
            self._send(500)
            return
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._send(200)

    def _create(self, request: dict[str, str]) -> None:
        repo = f"{request.get('organization') or 'user'}/{request['name']}"
        status = 409 if repo in self.server.models else 200
        self.server.models.setdefault(repo, {})
        self._json(status, {"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.models[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        self._json(
            200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, status: int, data: Any) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._listing(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve("datasets" if match[1] else "models", *match.groups()[1:])
        elif path in self.server.plain:
            content = self.server.plain[path]
            if self.headers.get("Authorization"):
                self._send(400)  # a login of the hub is nobody else's business
            else:
                md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
                hashes = {"x-goog-hash": f"crc32c=AAAAAA==, md5={md5}"} if self.server.with_sizes else {}
                self._bytes(self.server.served.get(path, content), {"ETag": '"e1"', **hashes})
        elif match := re.fullmatch(r"/content/(\w+)/([^/]+/[^/]+)/(.+)", path):
            content = self.server.repository(match[1], match[2])[1][match[3]]
            self._bytes(self.server.served.get(match[3], content), {})
        else:
            self._send(200 if path == "/" else 404)

    def _found(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in (self.server.data_sets if kind == "datasets" else self.server.models):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
            return None
        commit, files = self.server.repository(kind, repo)
        if revision not in ("main", commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, files

    def _listing(self, kind: str, repo: str, revision: str) -> None:
        if found := self._found(kind, repo, revision):
            commit, files = found
            siblings = [self._sibling(name, content) for name, content in files.items()]
            self._send(200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def _tree(self, kind: str, repo: str, revision: str, below: str) -> None:
        if not (found := self._found(kind, repo, revision)):
            return
        entries = []
        for name, content in found[1].items():
            if name.startswith(f"{below}/" if below else ""):
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
                digest = hashlib.sha256(content).hexdigest()
                large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
                entries.append({**entry, **(large if len(content) >= LARGE else {})})
        if entries:
            self._json(200, entries)
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"})

    def _sibling(self, name: str, content: bytes) -> dict[str, object]:
        if not self.server.with_sizes:
            return {"rfilename": name}
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {
            "rfilename": name,
            "size": len(content),
            "blobId": git_sha1(content),
            **({"lfs": lfs} if len(content) >= LARGE else {}),
        }

    def _resolve(self, kind: str, repo: str, revision: str, name: str) -> None:
        if not (found := self._found(kind, repo, revision)):
            return
        commit, files = found
        content = files.get(name)
        if content is None:
            self._send(404, {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"})
        elif len(content) >= LARGE:  # the etag of the linked file; its content lies on another host
            linked = {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.server.url.replace('127.0.0.1', 'localhost')}/content/{kind}/{repo}/{name}",
                "ETag": f'"{git_sha1(b"pointer")}"',
            }
            self._send(302, {"X-Repo-Commit": commit, **linked})
        else:
            self._bytes(content, {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'})

    def _bytes(self, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET":
            if self.server.refused:
                self._send(503)
                return
            self.server.ranges.append(self.headers.get("Range", ""))
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        cut = self.server.cuts.pop(0) if self.command == "GET" and self.server.cuts else None
        self._send(206 if match else 200, headers, content[start:], cut=cut)

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut is not None

    def log_message(self, *arguments: object) -> None:
        pass


def _mode(file: dict[str, Any]) -> str:
    return "lfs" if file["size"] >= LARGE else "regular"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


if __name__ == "__main__":
    hub = HubServer(int(sys.argv[2]))
    hub.add_folder(Path(sys.argv[1]))
    print("ready", flush=True)
    hub.serve_forever()
