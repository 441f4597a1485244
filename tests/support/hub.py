"""A stub of the hub's upload API on this machine: repositories as dictionaries of bytes."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """`repos`: id -> path -> bytes, of commits that came whole; `fail`: a status to give."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}  # as asked for
        self.commits: list[str] = []
        self.stored: dict[str, bytes] = {}  # large files by their hash
        self.fail: int | None = None
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        if self.fail is not None:
            return self.fail, {"error": "the stub is out of order"}
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        asked = json.loads(body) if body[:1] == b"{" and b"\n" not in body.strip() else {}
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, {})
            private = {True: "private", False: "public"}.get(asked.get("private"))
            self.visibility[name] = asked.get("visibility", private)
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/objects/batch"):
            objects = [self._batch(each) for each in asked["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": _mode(file["path"])}
                for file in asked["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            self._commit(repo, body)
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40}
        return 200, {"id": repo, "sha": "0" * 40, "siblings": []}

    def _batch(self, wanted: dict) -> dict:
        upload = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}
        return wanted | {"authenticated": True, "actions": {"upload": upload}}

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.stored[value["oid"]]


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path = self.path.partition("?")[0]
            status, said = hub.answer(self.command, path, self.rfile.read(length))
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
