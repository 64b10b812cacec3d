"""A small Hugging Face hub on 127.0.0.1: repositories with commits, branches and tags, as the hub's client asks for them."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    is_gated: bool = False

    def commit(self, files: dict[str, bytes], *, tag: str | None = None) -> str:
        """A new commit on main, of all of its files."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs["main"] = files, sha
        self.refs |= {tag: sha} if tag else {}
        return sha


class SmallHub:
    """`with SmallHub() as hub`: serves `hub.repos` ("models/ORG/NAME", "datasets/ORG/NAME") at `hub.url`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []  # "METHOD PATH" of every request
        self.ranges: list[str] = []  # that were asked for
        self.break_at: int | None = None  # the byte of a file at which the connection is closed

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            @property
            def hub(self):
                return hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str) -> Repo:
        self.repos[name] = Repo()
        return self.repos[name]

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self) -> None:
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.hub.asked.append(f"{self.command} {path}")
        is_api = path.startswith("/api/")
        parts = path.removeprefix("/api").strip("/").split("/")
        if not is_api and parts[0] != "datasets":
            parts = ["models", *parts]
        repo, rest = self.hub.repos.get("/".join(parts[:3])), parts[3:]
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if repo.is_gated and verb == "resolve":
            return self.refuse(401, "GatedRepo")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repo.commits[commit]
        if verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.send_json({"id": "/".join(parts[1:3]), "sha": commit, "siblings": siblings})
        if verb == "tree":
            below = "".join(f"{part}/" for part in rest[2:])
            return self.send_json(list(_entries(files, below, "true" in map(str.lower, query.get("recursive", [])))))
        if verb == "paths-info":
            wanted = parse_qs(body).get("paths") or json.loads(body)["paths"]
            return self.send_json([entry for entry in _entries(files, "", True) if entry["path"] in wanted])
        if verb == "resolve" and (name := "/".join(rest[2:])) in files:
            return self.send_file(files[name], commit)
        return self.refuse(404, "EntryNotFound", commit)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit})

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, status, most = 0, 200, self.hub.break_at
        if span := self.headers.get("Range"):
            self.hub.ranges.append(span)
            start, status = int(span.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(status, content[start:], headers, None if most is None else max(0, most - start))

    def send(self, status: int, content: bytes, headers: dict[str, str], most: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(content[:most])
            self.close_connection |= most is not None and most < len(content)


def _entries(files: dict[str, bytes], below: str, recursive: bool) -> Iterator[dict]:
    """Entries of a tree: files, and the folders that they lie in."""
    folders = set()
    for path, content in files.items():
        if not path.startswith(below):
            continue
        inner = path.removeprefix(below)
        for depth in range(1, inner.count("/") + 1):
            folder = below + "/".join(inner.split("/")[:depth])
            if folder not in folders and (recursive or depth == 1):
                folders.add(folder)
                yield {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        if recursive or "/" not in inner:
            yield {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
