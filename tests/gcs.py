"""A Google Cloud Storage on this machine: what tests give paths on gs:// to."""

from __future__ import annotations

import contextlib
import http
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import fsspec
from etils.epath import backend
from gcp_storage_emulator import exceptions, server
from gcp_storage_emulator.handlers import objects


@contextlib.contextmanager
def fake_gcs() -> Iterator[str]:
    """Starts a server whose objects live in memory; gives the path of a bucket on it.

    This process and those that it starts then find gs:// there, by `STORAGE_EMULATOR_HOST`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    variables = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        # Where TensorStore, and so Orbax, looks: a process reads it once.
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        "GOOGLE_AUTH_TEST_MODE": "1",
        # What kind of bucket it is would be asked of the real service.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with mock.patch.dict(os.environ, variables), _generations():
        found.start()
        _forget_connections()
        try:
            yield "gs://bucket"
        finally:
            _forget_connections()
            found.stop()


@contextlib.contextmanager
def _generations() -> Iterator[None]:
    """What the real server does with generations: `ifGenerationMatch` is checked, and what is read tells its own."""
    lock = threading.Lock()

    def checked(handler: Callable) -> Callable:
        def handle(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
            wanted = request.query.get("ifGenerationMatch")
            with lock:
                if wanted and int(wanted[0]) != _generation(request, storage):
                    response.status = http.HTTPStatus.PRECONDITION_FAILED
                else:
                    handler(request, response, storage, *rest, **options)

        return handle

    def telling(handler: Callable) -> Callable:
        def handle(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
            response["x-goog-generation"] = str(_generation(request, storage))
            handler(request, response, storage, *rest, **options)

        return handle

    wrapped = {function: checked(function) for function in (objects.insert, objects.delete)}
    wrapped |= {function: telling(function) for function in (objects.get, objects.download)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(objects, "insert", wrapped[objects.insert]))
        for _, handlers in server.HANDLERS:
            found = {method: wrapped[handler] for method, handler in handlers.items() if handler in wrapped}
            stack.enter_context(mock.patch.dict(handlers, found))
        yield


def _generation(request: Any, storage: Any) -> int:
    """Of the object that a request is about; 0 where there is none."""
    name = (
        request.params.get("object_id") or request.query.get("name", [""])[0] or request.data["meta"]["name"]
    )
    try:
        return int(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except exceptions.NotFound:
        return 0


def _forget_connections() -> None:
    """`epath` and fsspec keep the connections that they have made, to whatever server."""
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()
