"""An object server on this machine for tests and benchmarks: Google Cloud Storage, S3 and plain HTTP, with faults.

    with object_server(folder, Faults(latency_s=0.05)) as server:  # folder/bucket/… are objects from the start
        ...  # gs:// of this process and its children is the server: `server.environment` is set
    python -m tests.object_server FOLDER --latency_s=0.05         # prints its variables as JSON; runs until killed

Speaks what gcsfs and TensorStore use of the JSON API, and GET, HEAD and ListObjectsV2 of S3 at /BUCKET/NAME. Objects
are in memory, except those of the folder, which is never written to. GET /statistics answers the counters.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from unittest import mock
from urllib.parse import unquote
from xml.sax.saxutils import escape

import fsspec
import google_crc32c
from aiohttp import web
from etils.epath import backend

from tests.gcs import free_port, process_port

_BATCHED = re.compile(r"^(DELETE|GET) (\S+) HTTP", re.MULTILINE)


@dataclasses.dataclass
class Faults:
    """Injected into every request; may be changed at any time.

    Attributes:
      latency_s: delay of each answer.
      slow_share, slow_s: share of the answers that take `slow_s` instead.
      error_share: share of the requests that are answered with 503.
      drop_share: share of the requests whose connection is closed without an answer.
      flip_share: share of the answers with a flipped bit.
    """

    latency_s: float = 0.0
    slow_share: float = 0.0
    slow_s: float = 1.0
    error_share: float = 0.0
    drop_share: float = 0.0
    flip_share: float = 0.0


class ObjectServer:
    """The objects and counters of a server.

    Attributes:
      faults: injected from now on.
      url: of the server.
      counts: "requests", "bytes" (sent), "peak" (requests in flight), requests by method, such as "GET", and injected
        faults, "slow", "errors" and "drops".
      log: (method, path, Range header) of each request, if `keep_log`.
    """

    def __init__(self, folder: str | os.PathLike | None = None, faults: Faults | None = None, port: int = 0):
        self._folder = pathlib.Path(folder).resolve() if folder else None
        self._written: dict[str, bytes] = {}
        self._deleted: set[str] = set()
        self._maps: dict[tuple[str, int, int, int], mmap.mmap] = {}
        self._summaries: dict[tuple, tuple[int, str, str]] = {}
        self._generations: collections.Counter[str] = collections.Counter()
        self._uploads: dict[str, tuple[str, str | None, bytearray]] = {}
        self._random, self._in_flight = random.Random(0), 0
        self.faults, self.counts = faults or Faults(), collections.Counter[str]()
        self.keep_log, self.log = False, list[tuple[str, str, str]]()
        self.url = f"http://127.0.0.1:{port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point gs:// and s3:// to the server, for this process's children."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TEST_MODE": "1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # otherwise gcsfs asks the real service for the bucket's type
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def __getitem__(self, path: str) -> bytes:
        """The content of BUCKET/NAME. Raises KeyError."""
        if path in self._written:
            return self._written[path]
        if self._folder and path not in self._deleted and (self._folder / path).is_file():
            return (self._folder / path).read_bytes()
        raise KeyError(path)

    def __setitem__(self, path: str, content: bytes) -> None:
        self._written[path] = content
        self._deleted.discard(path)
        self._generations[path] += 1

    def __delitem__(self, path: str) -> None:
        self[path]
        self._written.pop(path, None)
        self._deleted.add(path)

    def paths(self, prefix: str = "") -> list[str]:
        """The sorted BUCKET/NAME of all objects that begin with `prefix`."""
        walk = os.walk(self._folder / prefix.rpartition("/")[0]) if self._folder else ()
        local = {os.path.relpath(f"{parent}/{name}", self._folder) for parent, _, names in walk for name in names}
        return sorted(path for path in self._written.keys() | local - self._deleted if path.startswith(prefix))

    def application(self) -> web.Application:
        """The server's handlers."""
        application = web.Application(middlewares=[self._inject], client_max_size=2**30)
        for path in ("/storage/v1/b/{bucket}/o/{name:.+}", "/download/storage/v1/b/{bucket}/o/{name:.+}"):
            application.router.add_get(path, self._get, allow_head=False)
        add = application.router.add_route
        add("GET", "/statistics", self._statistics)
        add("DELETE", "/storage/v1/b/{bucket}/o/{name:.+}", self._delete)
        add("POST", "/storage/v1/b/{bucket}/o/{name:.+}/{verb:rewriteTo|copyTo}/b/{to}/o/{target:.+}", self._copy)
        add("GET", "/storage/v1/b/{bucket}/o", self._list)
        add("GET", "/storage/v1/b/{bucket}", self._bucket)
        add("*", "/upload/storage/v1/b/{bucket}/o", self._upload)
        add("POST", "/batch/storage/v1", self._batch)
        add("GET", "/{bucket}", self._list_s3)
        application.router.add_get("/{bucket}/{name:.+}", self._get_plain)
        return application

    @web.middleware
    async def _inject(self, request: web.Request, handler) -> web.StreamResponse:
        faults, counts = self.faults, self.counts
        if request.path == "/statistics":
            return await handler(request)
        if self.keep_log:
            self.log.append((request.method, unquote(request.path), request.headers.get("Range", "")))
        shares = faults.slow_share, faults.error_share, faults.drop_share, faults.flip_share
        slow, error, drop, flip = (self._random.random() < share for share in shares)
        counts.update({"requests": 1, request.method: 1, "slow": slow, "errors": error, "drops": drop})
        self._in_flight += 1
        counts["peak"] = max(counts["peak"], self._in_flight)
        try:
            if delay := faults.slow_s if slow else faults.latency_s:
                await asyncio.sleep(delay)
            if drop and request.transport:
                request.transport.abort()
                return web.Response()
            if error:
                return web.Response(status=503, text="injected")
            response = await handler(request)
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                if flip and response.body:
                    response.body = bytes([response.body[0] ^ 1]) + response.body[1:]
                counts["bytes"] += len(response.body) if request.method != "HEAD" else 0
            return response
        finally:
            self._in_flight -= 1

    def _content(self, path: str) -> bytes:
        try:
            return self[path]
        except KeyError:
            raise web.HTTPNotFound(text=json.dumps({"error": {"code": 404, "message": path}})) from None

    def _identity(self, path: str) -> tuple[str, int, int, int] | None:
        """What tells a file of the folder from others and from later content; None of what was written or deleted."""
        local = f"{self._folder}/{path}"  # pathlib would take a part of the time that listings are measured by
        if path in self._written or path in self._deleted or not self._folder or not os.path.isfile(local):
            return None
        status = os.stat(local)
        return path, status.st_ino, status.st_mtime_ns, status.st_size

    def _mapped(self, path: str) -> bytes | mmap.mmap:
        """The content, memory-mapped if it is a file: most requests are for a small range of a large one."""
        key = self._identity(path)
        if key is None or not self._folder:
            return self._content(path)
        if key not in self._maps and key[-1]:
            with open(self._folder / path, "rb") as file:
                self._maps[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps.get(key, b"")

    def _summary(self, path: str) -> tuple[int, str, str]:
        """Size, MD5 and CRC-32C; kept of files, linked ones too, since a listing has those of all its objects."""
        key = (self._identity(path) or (path,))[1:]
        summary = self._summaries.get(key) or _summarize(self._content(path))
        return self._summaries.setdefault(key, summary) if key else summary

    def _metadata(self, path: str) -> dict[str, str]:
        bucket, name = path.split("/", 1)
        size, md5, crc32c = self._summary(path)
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(size),
            "md5Hash": md5,
            "crc32c": crc32c,
            "generation": str(self._generation(path)),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _generation(self, path: str) -> int:
        """0 if there is no object."""
        return 1 + self._generations[path] if path in self._written or self._identity(path) else 0

    def _check_generation(self, path: str, expected: str | None) -> None:
        if expected is not None and int(expected) != self._generation(path):
            raise web.HTTPPreconditionFailed(text="{}")

    def _ranged(self, request: web.Request, path: str) -> web.Response:
        content = self._mapped(path)
        headers = {"x-goog-generation": str(self._generation(path)), "ETag": f'"{self._generation(path)}"'}
        start, stop = request.http_range.start, request.http_range.stop
        if start is None and stop is None:
            return web.Response(body=content[:], headers=headers)
        first, last, _ = slice(start, stop).indices(len(content))
        if first >= len(content):
            return web.Response(status=416, headers=headers | {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
        return web.Response(status=206, body=content[first:last], headers=headers)

    async def _get(self, request: web.Request) -> web.Response:
        path = "{bucket}/{name}".format(**request.match_info)
        if request.query.get("alt") == "media":
            return self._ranged(request, path)
        return web.json_response(self._metadata(path))

    async def _get_plain(self, request: web.Request) -> web.Response:
        return self._ranged(request, "{bucket}/{name}".format(**request.match_info))

    async def _bucket(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "storage#bucket", "name": request.match_info["bucket"]})

    def _listing(self, request: web.Request) -> tuple[list[str], list[str]]:
        """Paths of objects, and common prefixes without the bucket."""
        bucket, query = request.match_info["bucket"], request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        objects, prefixes = [], set()
        for path in self.paths(f"{bucket}/{prefix}"):
            rest = path[len(bucket) + 1 + len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                objects.append(path)
        return objects, sorted(prefixes)

    async def _list(self, request: web.Request) -> web.Response:
        objects, prefixes = self._listing(request)
        start, size = int(request.query.get("pageToken", 0)), min(int(request.query.get("maxResults", 1000)), 1000)
        page = [self._metadata(path) for path in objects[start : start + size]]
        more = {"nextPageToken": str(start + size)} if start + size < len(objects) else {}
        return web.json_response({"kind": "storage#objects", "items": page, "prefixes": prefixes, **more})

    async def _list_s3(self, request: web.Request) -> web.Response:
        objects, prefixes = self._listing(request)
        start, size = int(request.query.get("continuation-token", 0)), int(request.query.get("max-keys", 1000))
        page = objects[start : start + size]
        bucket, more = request.match_info["bucket"], start + size < len(objects)
        items = "".join(
            f"<Contents><Key>{escape(path[len(bucket) + 1 :])}</Key><Size>{self._summary(path)[0]}</Size>"
            f"<ETag>{self._generation(path)}</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in page
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in prefixes)
        token = f"<NextContinuationToken>{start + size}</NextContinuationToken>" if more else ""
        text = (
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
            f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{size}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{token}{items}</ListBucketResult>"
        )
        return web.Response(text=text, content_type="application/xml")

    async def _delete(self, request: web.Request) -> web.Response:
        path = "{bucket}/{name}".format(**request.match_info)
        self._content(path)
        self._check_generation(path, request.query.get("ifGenerationMatch"))
        del self[path]
        return web.Response(status=204)

    async def _copy(self, request: web.Request) -> web.Response:
        path, target = "{bucket}/{name}".format(**request.match_info), "{to}/{target}".format(**request.match_info)
        self[target] = self._content(path)
        return web.json_response({"done": True, "resource": self._metadata(target)})

    def _insert(self, path: str, content: bytes, generation: str | None) -> web.Response:
        self._check_generation(path, generation)
        self[path] = content
        return web.json_response(self._metadata(path))

    async def _upload(self, request: web.Request) -> web.Response:
        """Uploads: media, multipart, and resumable in chunks."""
        query, body, bucket = request.query, await request.read(), request.match_info["bucket"]
        generation = query.get("ifGenerationMatch")
        if upload := query.get("upload_id"):
            path, generation, data = self._uploads[upload]
            data += body
            if request.headers.get("Content-Range", "/0").endswith("/*"):
                return web.Response(status=308, headers={"Range": f"bytes=0-{len(data) - 1}"})
            return self._insert(path, bytes(data), generation)
        if query["uploadType"] == "media":
            return self._insert(f"{bucket}/{query['name']}", body, generation)
        if query["uploadType"] == "resumable":
            name, upload = query.get("name") or json.loads(body)["name"], str(len(self._uploads))
            self._uploads[upload] = f"{bucket}/{name}", generation, bytearray()
            return web.Response(headers={"Location": f"{self.url}{request.path}?upload_id={upload}"})
        boundary = request.headers["Content-Type"].split("boundary=")[1].strip("'\"").encode()
        # Not a library's parser: gcsfs ends lines with \n alone, others with \r\n.
        _, metadata, rest = body.split(b"--" + boundary, 2)
        content = re.split(rb"\r?\n\r?\n", rest.rsplit(b"--" + boundary + b"--", 1)[0], maxsplit=1)[1]
        name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
        return self._insert(f"{bucket}/{name}", re.sub(rb"\r?\n\Z", b"", content), generation)

    async def _batch(self, request: web.Request) -> web.Response:
        parts = []
        for method, url in _BATCHED.findall(await request.text()):
            path, status = unquote(url.split("?")[0]).removeprefix("/storage/v1/b/").replace("/o/", "/", 1), 204
            try:
                if method == "DELETE":
                    del self[path]
            except KeyError:
                status = 404
            parts.append(f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} -\r\n\r\n\r\n")
        headers = {"Content-Type": "multipart/mixed; boundary=batch"}
        return web.Response(body=("".join(parts) + "--batch--").encode(), headers=headers)

    async def _statistics(self, _: web.Request) -> web.Response:
        return web.json_response(dict(self.counts))


def _summarize(content: bytes) -> tuple[int, str, str]:
    checksums = hashlib.md5(content).digest(), google_crc32c.value(content).to_bytes(4, "big")
    md5, crc32c = (base64.b64encode(checksum).decode() for checksum in checksums)
    return len(content), md5, crc32c


async def _serve(server: ObjectServer, port: int, started: Callable[[], object], stopped: asyncio.Event) -> None:
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024, reuse_address=True).start()
    started()
    await stopped.wait()
    await runner.cleanup()


@contextlib.contextmanager
def object_server(folder: str | os.PathLike | None = None, faults: Faults | None = None) -> Iterator[ObjectServer]:
    """Runs a server in a thread, and sets its variables in this process's environment; one at a time."""
    server = ObjectServer(folder, faults, port := process_port())
    started, loop = threading.Event(), asyncio.new_event_loop()
    stopped = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(_serve(server, port, started.set, stopped),), daemon=True
    )
    with mock.patch.dict(os.environ, server.environment):
        thread.start()
        if not started.wait(10):
            raise RuntimeError(f"the object server did not start on port {port}")
        forget_connections()
        try:
            yield server
        finally:
            forget_connections()
            loop.call_soon_threadsafe(stopped.set)
            thread.join()
            loop.close()


def forget_connections() -> None:
    """Clears the connections that `epath` and fsspec cache."""
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for field in dataclasses.fields(Faults):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    args = vars(parser.parse_args())
    server = ObjectServer(args.pop("folder"), Faults(**args), port := free_port())
    asyncio.run(_serve(server, port, lambda: print(json.dumps(server.environment), flush=True), asyncio.Event()))


if __name__ == "__main__":
    main()
