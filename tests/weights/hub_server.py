"""A hub on this machine, of two servers: it lists, redirects, breaks off, damages and refuses as it is told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO, COMMIT = "winds/tiny", "c0ffee" + "0" * 34


class Hub:
    """What the two servers of a hub share: the files, what is to go wrong, and what was asked and sent."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.sent: dict[str, int] = {}  # bytes of each file that left, over all requests
        self.cuts: dict[str, list[int]] = {}  # after how many bytes the next answers with a file break off
        self.damaged: set[str] = set()
        self.statuses: dict[str, list[int]] = {}  # the next answers for a file, 200 for one that is given
        self.error_codes: dict[int, str] = {403: "GatedRepo"}
        self.listing_status, self.listing_code = 200, ""
        self.ranges = True
        self.listing: dict[str, Any] | str | None = None
        self.endpoint = self.storage = ""

    def listed(self) -> dict[str, Any]:
        return {"id": REPO, "sha": COMMIT, "siblings": [entry(name, data) for name, data in self.files.items()]}

    def fetched(self) -> list[str]:
        return [path for _, path, _ in self.asked if not path.startswith("/api/")]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".model"))


def entry(name: str, data: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    row = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if is_large(name):
        row["blobId"] = "d" * 40  # of the pointer
        row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row


class Answers(BaseHTTPRequestHandler):
    """The hub: its API, its small files, and redirects to where the large ones are stored."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.asked.append((self.command, url.path, {name.lower(): text for name, text in self.headers.items()}))
        name = unquote(url.path.partition(f"/{REPO}/resolve/{COMMIT}/")[2])
        if url.path.startswith("/storage/"):
            self.file(url.path.removeprefix("/storage/"))
        elif url.path.startswith("/api/"):
            self.list(url.path, parse_qs(url.query))
        elif name not in self.hub.files:
            self.answer(404, b"{}", "EntryNotFound")
        elif (status := (self.hub.statuses.get(name) or [200]).pop(0)) != 200:
            self.answer(status, b"{}", self.hub.error_codes.get(status, ""))
        elif is_large(name):
            self.answer(302, b"", location=f"{self.hub.storage}/storage/{name}")
        else:
            self.file(name)

    def list(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(rf"/api/models/{REPO}/revision/(main|{COMMIT})", path)
        if self.hub.listing_status != 200:
            self.answer(self.hub.listing_status, b"{}", self.hub.listing_code)
        elif not found:
            is_repo = path.startswith(f"/api/models/{REPO}/")
            self.answer(404 if is_repo else 401, b"{}", "RevisionNotFound" if is_repo else "RepoNotFound")
        elif isinstance(self.hub.listing, str):
            self.answer(200, self.hub.listing.encode())
        else:
            assert query["blobs"][0].lower() == "true", "checksums are not asked for"
            self.answer(200, json.dumps(self.hub.listing or self.hub.listed()).encode())

    def file(self, name: str) -> None:
        data, status = self.hub.files[name], 200
        if name in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        total = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.hub.ranges:
            status, data = 206, data[int(asked[1]) :]
        length = len(data)
        cuts = self.hub.cuts.get(name)
        data = data[: cuts.pop(0)] if cuts else data
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(data)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {total - length}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = len(data) < length

    def answer(self, status: int, data: bytes, code: str = "", location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for header, text in (("X-Error-Code", code), ("Location", location)):
            if text:
                self.send_header(header, text)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
