"""A small Hugging Face hub on 127.0.0.1: what `conj push` asks of the real one, kept in memory."""

import base64
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import ENV

TOKENS = {"hf_writer": "me", "hf_reader": None}  # token: the name that it may write to
COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """`files` of each branch; `large`: how the names of files end that do not go into the commit itself."""

    def __init__(self, large: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.large, self.files, self.blobs, self.requests, self.commits = large, {}, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def env(self, home: Path, token: str | None = "hf_writer") -> dict[str, str]:
        """The environment of a process that takes this for the hub."""
        given = {k: v for k, v in ENV.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy")}
        given |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return given | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, parts = self.server, self.path.strip("/").split("/")
        hub.requests.append((self.path, body))
        owner = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "), "nobody")
        if parts[-1] == "validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if owner == "nobody":
            return self.answer({"error": "Invalid credentials"}, 401)
        if owner is None:
            return self.answer({"error": "You don't have the rights to do that"}, 403)
        if parts[-1] == "create":
            asked = json.loads(body)
            name = f"{asked['organization'] or owner}/{asked['name']}"
            there = name in hub.files
            hub.files.setdefault(name, {"main": {".gitattributes": b""}})
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if there else 200)
        if parts[-1] == "batch":
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        name, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "branch":
            hub.files[name].setdefault(branch, dict(hub.files[name]["main"]))
            return self.answer({})
        if what == "preupload":
            modes = {
                f["path"]: "lfs" if f["path"].endswith(hub.large) and hub.large else "regular"
                for f in json.loads(body)["files"]
            }
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        assert what == "commit"
        hub.commits.append(branch)
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                hub.files[name][branch][value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                hub.files[name][branch][value["path"]] = hub.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                del hub.files[name][branch][value["path"]]
        self.answer({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self):
        parts = self.path.strip("/").split("/")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[parts[-1]] = body
        self.answer({})

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4])
        files = self.server.files.get(name)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404)
        if parts[4:5] == ["tree"]:
            rows = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files[parts[5]].items()]
            return self.answer(rows)
        self.answer({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []})

    def answer(self, content, status: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def fake_hub(large: tuple[str, ...] = ()) -> Iterator[Hub]:
    assert os.environ.get("HF_HUB_OFFLINE") == "1"  # nothing here may reach the real one
    with Hub(large) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
