"""A server that speaks as much of the Hugging Face Hub's HTTP as a model's way down and up takes, over folders.

Files over 2 kB are large ones (LFS), told by their SHA-256; others have git's hash.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 2000


class Hub:
    """A context manager: `address` is what HF_ENDPOINT must be.

    repositories: id -> folder. cut: path -> after how many bytes of an answer the connection breaks, and how often.
    wrong: paths whose answers have a wrong byte. gets: (path, first byte) of each file asked for.
    home: where repositories are made that are asked for; None: nobody may write. made: what was said of each.
    """

    def __init__(self, repositories: dict[str, Path], home: Path | None = None):
        self.repositories, self.home = repositories, home
        self.made: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}  # large files that came, by their SHA-256
        self.cut: dict[str, list[int]] = {}
        self.wrong: set[str] = set()
        self.gets: list[tuple[str, int]] = []

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


def entries(folder: Path) -> list[dict]:
    """Every file with its size and hashes."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        entry = {"name": file.relative_to(folder).as_posix(), "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if len(data) > LARGE:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        found.append(entry)
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    # --- what is sent here ---

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if self.hub.home is None or self.headers.get("Authorization") != "Bearer hf_test":
            return self._send(403, b'{"error": "no right to write here"}', {"Content-Type": "application/json"})
        if parts == ["api", "repos", "create"]:
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            self.hub.repositories.setdefault(name, self.hub.home / name).mkdir(parents=True, exist_ok=True)
            self.hub.made.setdefault(name, said)
            return self._json({"url": f"{self.hub.address}/{name}"})
        if parts[-1] == "validate-yaml":  # the head of a README
            return self._json({"errors": [], "warnings": []})
        if parts[-1] == "batch":
            objects = [self._action(wanted) for wanted in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if "preupload" in parts:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        return self._commit("/".join(parts[2:4]), body)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._send(200, b"", {})

    def _action(self, wanted: dict) -> dict:
        there = wanted["oid"] in self.hub.objects
        return wanted | ({} if there else {"actions": {"upload": {"href": f"{self.hub.address}/put/{wanted['oid']}"}}})

    def _commit(self, name: str, body: bytes) -> None:
        folder = self.hub.repositories[name]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            large = line["key"] == "lfsFile"
            data = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(data)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    # --- what is asked for ---

    def _answer(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        folder = self.hub.repositories.get(f"{owner}/{name}")
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if api and rest[:1] == ["tree"]:
            return self._json([self._tree_entry(entry) for entry in entries(folder)])
        if api:
            siblings = [self._sibling(entry) for entry in entries(folder)]
            return self._json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
        return self._file(folder, "/".join(rest[2:]))

    def _tree_entry(self, entry: dict) -> dict:
        found = {"type": "file", "path": entry["name"], "size": entry["size"], "oid": entry["oid"]}
        lfs = {"oid": entry.get("sha256"), "size": entry["size"], "pointerSize": 130}
        return found | ({"lfs": lfs} if "sha256" in entry else {})

    def _sibling(self, entry: dict) -> dict:
        found = {"rfilename": entry["name"], "size": entry["size"], "blobId": entry["oid"]}
        lfs = {"sha256": entry.get("sha256"), "size": entry["size"], "pointerSize": 130}
        return found | ({"lfs": lfs} if "sha256" in entry else {})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, name: str) -> None:
        entry = next((entry for entry in entries(folder) if entry["name"] == name), None)
        if entry is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = bytearray((folder / name).read_bytes())
        if name in self.hub.wrong:
            data[len(data) // 2] ^= 1
        etag = entry.get("sha256", entry["oid"])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if self.command == "GET":
            self.hub.gets.append((name, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(name, []) if self.command == "GET" else []
        self._send(206 if start else 200, bytes(data[start:]), headers, cuts.pop(0) if cuts else None)

    def _send(self, code: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        self.wfile.flush()
        if cut is not None:
            self.connection.close()
            self.close_connection = True
