"""An emulator of Google Cloud Storage for tests with gs:// paths."""

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

_PORT = "LVM_TEST_OBJECT_PORT"  # environment variable: processes that a test starts use its server


def process_port() -> int:
    """The port of all servers of a process, of which one may run at a time.

    TensorStore reads a server's address once per process.
    """
    if _PORT not in os.environ:
        os.environ[_PORT] = str(free_port())
    return int(os.environ[_PORT])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def fake_gcs() -> Iterator[str]:
    """Starts an in-memory server and yields the path of a bucket on it.

    This process and its children use it for gs://, by `STORAGE_EMULATOR_HOST`.
    """
    port = process_port()
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    variables = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        "GOOGLE_AUTH_TEST_MODE": "1",
        # Otherwise gcsfs asks the real service for the bucket's type.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with mock.patch.dict(os.environ, variables), _generations():
        emulator.start()
        _forget_connections()
        try:
            yield "gs://bucket"
        finally:
            _forget_connections()
            emulator.stop()


@contextlib.contextmanager
def _generations() -> Iterator[None]:
    """Adds generations as on the real server: checks `ifGenerationMatch`, and returns them with reads."""
    lock = threading.Lock()

    def check_generation(handler: Callable) -> Callable:
        def handle(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
            expected = request.query.get("ifGenerationMatch")
            with lock:
                if expected and int(expected[0]) != _generation(request, storage):
                    response.status = http.HTTPStatus.PRECONDITION_FAILED
                else:
                    handler(request, response, storage, *rest, **options)

        return handle

    def add_generation(handler: Callable) -> Callable:
        def handle(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
            response["x-goog-generation"] = str(_generation(request, storage))
            handler(request, response, storage, *rest, **options)

        return handle

    wrapped = {function: check_generation(function) for function in (objects.insert, objects.delete)}
    wrapped |= {function: add_generation(function) for function in (objects.get, objects.download)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(objects, "insert", wrapped[objects.insert]))
        for _, handlers in server.HANDLERS:
            replaced = {method: wrapped[handler] for method, handler in handlers.items() if handler in wrapped}
            stack.enter_context(mock.patch.dict(handlers, replaced))
        yield


def _generation(request: Any, storage: Any) -> int:
    """The generation of a request's object; 0 if there is none."""
    name = request.params.get("object_id") or request.query.get("name", [""])[0] or request.data["meta"]["name"]
    try:
        return int(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except exceptions.NotFound:
        return 0


def _forget_connections() -> None:
    """Clears the connections that `epath` and fsspec cache."""
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()
