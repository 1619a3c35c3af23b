"""A small hub on loopback: the interface of the hub and of ModelScope, and the ways in which both can fail."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".parquet")
"""Suffixes of files that are stored as LFS (named by SHA-256)."""


@dataclass
class Faults:
    """What goes wrong; the counters are used up.

    Attributes:
        statuses: {part of the path: statuses served first}. retry_after: header of 429.
        cut: {part of the path: how often the connection ends at 30 % of what was asked for}.
        corrupt: {part of the path: how often one byte is wrong}.
        pause: seconds before every quarter of a file. redirect: files come from another address of the server.
        gated, private: every request is refused so. page: every answer is a web page. circle: it leads to itself.
    """

    statuses: dict[str, list[int]] = field(default_factory=dict)
    retry_after: str = ""
    cut: Counter[str] = field(default_factory=Counter)
    corrupt: Counter[str] = field(default_factory=Counter)
    pause: float = 0.0
    redirect: bool = False
    gated: bool = False
    private: bool = False
    page: bool = False
    circle: bool = False


class Hub:
    """The server; `repositories` maps ("models" or "datasets", id) to {path: bytes}."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """Add a repository; its commit."""
        self.repositories[kind, name] = files
        return self.commit(kind, name)

    def commit(self, kind: str, name: str) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.repositories[kind, name].items())
        return hashlib.sha1(json.dumps([kind, name, content]).encode()).hexdigest()

    def fetched(self, part: str) -> list[dict[str, str]]:
        """Headers of the requests for files whose path holds `part`."""
        return [
            headers
            for _, path, headers in self.requests
            if part in path and ("/resolve/" in path or "FilePath=" in path)
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def tree(files: dict[str, bytes]) -> list[dict]:
    """The listing of a repository as the hub gives it."""
    entries: list[dict] = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
    for path, data in sorted(files.items()):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "oid": git, "size": len(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entries.append(entry)
    return entries


def siblings(files: dict[str, bytes]) -> list[dict]:
    """The same listing as the hub gives it with the facts of a repository (`blobs=True`)."""
    entries = []
    for entry in tree(files)[1:]:
        large = entry.get("lfs")
        lfs = {"lfs": {"sha256": large["oid"], "size": large["size"], "pointerSize": 130}} if large else {}
        entries.append({"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], **lfs})
    return entries


def _names(commit: str, path: str, data: bytes) -> dict[str, str]:
    """Headers by which the hub names a file's content."""
    (entry,) = tree({path: data})[1:]
    large = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))} if "lfs" in entry else {}
    return {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit, **large}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, faults = self.hub, self.hub.faults
        headers = {name.title(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, self.path, headers))
        for part, statuses in faults.statuses.items():
            if part in self.path and statuses:
                status = statuses.pop(0)
                headers = {"Retry-After": faults.retry_after} if faults.retry_after and status == 429 else {}
                return self._send(status, b"no", headers)
        if faults.circle:
            return self._send(302, b"", {"Location": self.path})
        if faults.page:
            return self._send(200, b"<html>log in</html>", {"Content-Type": "text/html"})
        if faults.gated:
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if faults.private:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.split("/") if part]
        if parts[:2] == ["api", "v1"]:
            return self._modelscope(parts[2:], query)
        if parts[0] == "api":
            return self._api(parts[1], "/".join(parts[2:4]), parts[4:], query)
        if parts[0] == "cdn":
            return self._file(parts[1], "/".join(parts[2:4]), "/".join(parts[4:]))
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, _, commit, *rest = parts[1:] if kind == "datasets" else parts
        if (kind, f"{owner}/{name}") in hub.repositories and commit != hub.commit(kind, f"{owner}/{name}"):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if faults.redirect:
            return self._send(302, b"", {"Location": quote(f"/cdn/{kind}/{owner}/{name}/{'/'.join(rest)}")})
        return self._file(kind, f"{owner}/{name}", "/".join(rest))

    def _api(self, kind: str, name: str, rest: list[str], query: dict[str, str]) -> None:
        files = self.hub.repositories.get((kind, name))
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(kind, name)
        if rest[1] not in ("main", commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "revision":
            return self._json({"id": name, "sha": commit, "siblings": siblings(files)})
        entries, start = tree(files), int(query.get("cursor", 0))  # two entries a page, so that paging is used
        more = start + 2 < len(entries)
        link = f'<{self.hub.url}/api/{kind}/{name}/tree/{commit}?recursive=true&cursor={start + 2}>; rel="next"'
        return self._json(entries[start : start + 2], {"Link": link} if more else {})

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        kind, name, action = parts[0], "/".join(parts[1:3]), parts[3:]
        files = self.hub.repositories.get((kind, name))
        if files is None or query["Revision"] != "master":
            body = {"Code": 10010205001, "Success": False, "Message": "not found"}
            return self._send(404, json.dumps(body).encode())
        if action == ["repo"]:
            return self._file(kind, name, query["FilePath"])
        assert action == (["repo", "files"] if kind == "models" else ["repo", "tree"])
        entries = [
            {
                "Path": p,
                "Name": p.rpartition("/")[2],
                "Size": len(d),
                "Sha256": hashlib.sha256(d).hexdigest(),
                "Type": "blob",
            }
            for p, d in sorted(files.items())
        ]
        page = int(query.get("PageNumber", 1))
        return self._json({"Code": 200, "Success": True, "Data": {"Files": entries if page == 1 else []}})

    def _file(self, kind: str, name: str, path: str) -> None:
        data = self.hub.repositories.get((kind, name), {}).get(path)
        if data is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        faults = self.hub.faults
        for part in [part for part, count in faults.corrupt.items() if count > 0 and part in path]:
            faults.corrupt[part] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if "Range" in self.headers else 0
        if start and start >= len(data):
            return self._send(416, b"")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        for key, value in _names(self.hub.commit(kind, name), path, self.hub.repositories[kind, name][path]).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        for part in [part for part, count in faults.cut.items() if count > 0 and part in path]:
            faults.cut[part] -= 1
            self.wfile.write(body[: len(body) * 3 // 10])
            self.close_connection = True
            return None
        step = max(1, -(-len(body) // 4))
        for at in range(0, len(body), step):
            time.sleep(faults.pause)
            self.wfile.write(body[at : at + step])
        return None

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
