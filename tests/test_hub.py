"""Models on a hub: the real client against a small server on this machine, then offline."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from kaleido_jax import hub
from kaleido_jax.errors import UserError

pytest.importorskip("huggingface_hub", reason="hubs are reached through huggingface_hub")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "someone/shapes"
SCRIPT = """
import sys
import numpy as np
from kaleido_jax import Pipeline

what, name, folder = sys.argv[1:]
if what == "push":
    pipe = Pipeline.from_pretrained(folder)
    print(pipe.push_to_hub(name, dtype="float16"))
else:
    pipe = Pipeline.from_pretrained(name)
out = pipe("dawn: a red shape", num_steps=2, seed=1)
print("pictures", out.images.sum(), out.documents[0].latents)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's API a push and a download of small files use."""

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        store, path = self.server.store, self.path.partition("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            self.server.private = request.get("private") or request.get("visibility") == "private"
            self._json({"url": f"{self.server.address}/{NAME}", "name": NAME, "id": NAME})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": name, **mode} for name in files]})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    store[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{NAME}/commit/{self.server.commit}"
            self._json({"commitOid": self.server.commit, "commitUrl": url, "hookOutput": ""})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._json({"error": f"unknown {path}"}, 404)

    def do_GET(self) -> None:
        store, path = self.server.store, self.path.partition("?")[0]
        commit = self.server.commit
        if f"/{NAME}/resolve/" in path:
            name = path.rpartition("/")[2]
            etag = hashlib.sha1(store[name]).hexdigest()
            self._send(store[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            files = [{"rfilename": name} for name in store]
            self._json({"_id": "1", "id": NAME, "modelId": NAME, "sha": commit, "siblings": files})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in store.items()
            ]
            self._json(entries)
        else:
            self._json({"error": f"unknown {path}"}, 404)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.store, running.commit, running.private = {}, "0" * 39 + "7", None
        running.address = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def client(scratch: pathlib.Path, address: str, *words: str, **more: str) -> list[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(scratch / "home"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.mark.slow
def test_push_pull_and_offline(tmp_path, server):
    source = str(ROOT / "kaleido_jax" / "assets" / "shapes_baseline")
    address, pictures = client(tmp_path, server.address, "push", NAME, source)
    assert address == f"{server.address}/{NAME}" and server.private
    assert set(server.store) == set(hub.FILES)
    server.store[".gitattributes"] = b"* text"  # hubs add files of their own
    assert client(tmp_path, server.address, "pull", NAME, "-") == [pictures]
    server.shutdown()
    again = client(tmp_path, server.address, "pull", NAME, "-", HF_HUB_OFFLINE="1")
    assert again == [pictures]


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/..", "/a/b", "a/b@", "-a/b", "a b/c"])
def test_what_is_no_name(name):
    assert not hub.is_name(name)
    with pytest.raises(UserError, match="write owner/name"):
        hub.upload(pathlib.Path("x"), name, True, "m")


def test_names():
    assert all(map(hub.is_name, ["a/b", "apple/mdm-64", "a/b@main", "a/b@refs/pr/1"]))
