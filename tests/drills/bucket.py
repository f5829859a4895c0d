"""A bucket in memory behind the part of the Cloud Storage JSON API that gcsfs and tensorstore use.

Every write of an object gives it a new generation, and a write that names another one than there is fails:
that is what checkpoints rely on.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")
OBJECTS = re.compile(r"/(?:upload/)?storage/v1/b/([^/]+)/o")


class Bucket(BaseHTTPRequestHandler):
    """Handles one request; the stored objects are shared by all handlers."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]]  # name -> (generation, data)
    uploads: dict[str, tuple[str, bytes]]  # of resumable uploads: id -> (name, data so far)
    numbers: Any
    lock: Any

    def do_GET(self) -> None:
        """An object, its metadata, a listing, or the bucket."""
        path, query = self._parts()
        if found := OBJECT.fullmatch(path):
            return self._get(unquote(found[2]), query)
        if OBJECTS.fullmatch(path):
            return self._list(query)
        return self._reply(200, {"kind": "storage#bucket", "name": path.split("/")[-1]})

    def do_POST(self) -> None:
        """An upload in one request, the start of one in several, or a batch of deletions."""
        path, query = self._parts()
        body = self._body()
        if path.startswith("/batch/"):
            return self._batch(body)
        if not path.startswith("/upload/"):  # create a bucket
            return self._reply(409, {"error": {"code": 409, "message": "it is there"}})
        if "upload_id" in query:
            return self._continue(query["upload_id"], body)
        kind = query["uploadType"]
        if kind == "media":
            return self._put(query["name"], body, query)
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            _, about, data, _ = body.split(b"--" + boundary[1].encode(), 3)
            name = json.loads(_content(about))["name"]
            return self._put(name, re.sub(rb"\r?\n\Z", b"", _content(data)), query)
        number = str(next(self.numbers))
        self.uploads[number] = (query.get("name") or json.loads(body)["name"], b"")
        host = f"http://{self.headers['Host']}"
        return self._reply(200, {}, {"Location": f"{host}/upload/storage/v1/b/bucket/o?upload_id={number}"})

    def do_PUT(self) -> None:
        """The next bytes of a resumable upload."""
        self._continue(self._parts()[1]["upload_id"], self._body())

    def do_DELETE(self) -> None:
        """An object."""
        path, query = self._parts()
        found = OBJECT.fullmatch(path)
        assert found is not None
        self._reply(self._delete(unquote(found[2]), query), None)

    def _continue(self, number: str, body: bytes) -> None:
        name, data = self.uploads[number]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self.uploads[number] = name, data
            return self._reply(308, None, {"Range": f"bytes=0-{len(data) - 1}"})
        return self._put(name, data, {})

    def _get(self, name: str, query: dict[str, str]) -> None:
        if name not in self.objects:
            return self._reply(404, {"error": {"code": 404, "message": "not found"}})
        generation, data = self.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._reply(304, None)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._reply(412, None)
        if query.get("alt") != "media":
            return self._reply(200, self._about(name))
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._reply(200, data, headers)
        start = int(wanted[1]) if wanted[1] else len(data) - int(wanted[2])
        stop = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(data), len(data))
        if start >= len(data):
            return self._reply(416, None)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._reply(206, data[start:stop], headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._about(name))
        self._reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _put(self, name: str, data: bytes, query: dict[str, str]) -> None:
        with self.lock:
            there = self.objects.get(name, (0, b""))[0]
            if query.get("ifGenerationMatch", str(there)) != str(there):
                return self._reply(412, None)
            self.objects[name] = (next(self.numbers), data)
            return self._reply(200, self._about(name))

    def _delete(self, name: str, query: dict[str, str]) -> int:
        with self.lock:
            there = self.objects.get(name, (0, b""))[0]
            if query.get("ifGenerationMatch", str(there)) != str(there):
                return 412
            return 204 if self.objects.pop(name, None) else 404

    def _batch(self, body: bytes) -> None:
        names = re.findall(r"DELETE \S*?/storage/v1/b/[^/]+/o/(\S+)", body.decode())
        statuses = [self._delete(unquote(name.partition("?")[0]), {}) for name in names]
        head = "--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{}>\r\n\r\n"
        parts = [f"{head.format(i)}HTTP/1.1 {status} X\r\n\r\n\r\n" for i, status in enumerate(statuses, 1)]
        self._reply(200, "".join([*parts, "--batch--"]).encode(), {"Content-Type": "multipart/mixed; boundary=batch"})

    def _about(self, name: str) -> dict[str, str]:
        generation, data = self.objects[name]
        time = "2020-01-01T00:00:00.000Z"
        media = f"http://{self.headers['Host']}/download/storage/v1/b/bucket/o/{name.replace('/', '%2F')}?alt=media"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "mediaLink": media,
            "timeCreated": time,
            "updated": time,
        }

    def _parts(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, {key: values[0] for key, values in parse_qs(url.query).items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for key, text in headers.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def _content(part: bytes) -> bytes:
    """A part of a multipart body without its headers."""
    return re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]


class Server(ThreadingHTTPServer):
    """A server that ignores closed connections."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Print nothing: a client that misses an answer reports it."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[dict[str, str], dict[str, tuple[int, bytes]]]]:
    """An empty bucket called "bucket": the environment variables that point to it, and its objects."""
    numbers = itertools.count(1700000000000001)
    objects: dict[str, tuple[int, bytes]] = {}
    shared = {"objects": objects, "uploads": {}, "numbers": numbers, "lock": threading.RLock()}
    server = Server(("127.0.0.1", 0), type("One", (Bucket,), shared))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}, objects
    finally:
        server.shutdown()
        server.server_close()
