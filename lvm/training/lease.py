"""One run at a time in a workdir on gs://, which has no locks: an object that its holder renews."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import uuid

import requests
from etils import epath
from google.api_core import exceptions
from google.api_core.retry import Retry
from google.auth import credentials
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from lvm.common import errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info

STALE = 120.0  # seconds after which a lease that wasn't renewed is anybody's
_RENEWED = 30.0  # seconds between renewals
_LOOK = 5.0  # seconds between looks at somebody else's
_PATIENCE = 10.0  # seconds that a write may take: one that hangs must not outlive the lease


class Lease:
    """Holds `PATH`, a `gs://` object, until the process ends or `release` is called.

    Every write names the generation that it replaces, so of two that try one fails. Whoever was killed leaves a
    lease behind, which its successor waits for to grow stale.

    Args:
      path: the object.
      stale, renewed, look: the seconds above, for tests.

    Raises:
      UserError: another run holds it, and renews it.
    """

    def __init__(
        self, path: epath.PathLike, stale: float = STALE, renewed: float = _RENEWED, look: float = _LOOK
    ):
        self._path, self._stale, self._renewed, self._look = os.fspath(path), stale, renewed, look
        bucket, _, name = self._path.removeprefix("gs://").partition("/")
        self._bucket, self._name = _client().bucket(bucket), name
        self._owner = uuid.uuid4().hex
        self._released = threading.Event()
        self._generation = self._take()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Gives it back at once, so that the next run needn't wait."""
        if self._released.is_set():
            return
        self._released.set()
        try:
            self._bucket.blob(self._name).delete(if_generation_match=self._generation)
        except (exceptions.GoogleAPIError, requests.RequestException) as error:
            log_info(f"{self._path}: not given back ({error}); it is free in {self._stale:.0f} s")

    def _take(self) -> int:
        seen, since = self._generation_there(), time.monotonic()
        waited = False
        while True:
            if not seen or time.monotonic() - since > self._stale:
                try:
                    return self._write(seen, DEFAULT_RETRY)
                except exceptions.PreconditionFailed:  # another was faster, or only the answer was lost
                    if self._is_ours():
                        return self._generation
                    raise self._held() from None
            if not waited:
                log_info(
                    f"{self._path}: another run holds it or was killed; waiting {self._stale:.0f} s for a sign of it"
                )
                waited = True
            time.sleep(self._look)
            now = self._generation_there()
            if now and now != seen:
                raise self._held()
            seen = now

    def _held(self) -> UserError:
        return UserError(f"{self._path.rpartition('/')[0]}: another run is using this workdir")

    def _generation_there(self) -> int:
        """0 where there is no lease."""
        found = self._bucket.get_blob(self._name)
        return int(found.generation) if found else 0

    def _write(self, replaced: int, retry: Retry | None) -> int:
        blob = self._bucket.blob(self._name)  # anew: one that knows a generation asks for that one alone
        blob.upload_from_string(self._owner, if_generation_match=replaced, timeout=_PATIENCE, retry=retry)
        return int(blob.generation)

    def _is_ours(self) -> bool:
        """Whether what is there was written here after all; goes on from it then."""
        found = self._bucket.get_blob(self._name)
        if found is None or found.download_as_bytes(timeout=_PATIENCE) != self._owner.encode():
            return False
        self._generation = int(found.generation)
        return True

    def _renew(self) -> None:
        last = time.monotonic()
        while not self._released.wait(self._renewed):
            began = time.monotonic()
            try:
                try:
                    self._generation = self._write(self._generation, retry=None)  # this loop does that
                except exceptions.PreconditionFailed:
                    if not self._released.is_set() and not self._is_ours():
                        self._end("another run has taken it")
                last = began
            except (exceptions.GoogleAPIError, requests.RequestException) as error:
                # Before anybody may take it, not after.
                if time.monotonic() - last > self._stale - self._renewed - _PATIENCE:
                    self._end(f"it could not be renewed: {error}")

    def _end(self, reason: str) -> None:
        """Two runs must never write into one workdir, so this one ends at once."""
        print(f"error: {self._path}: the lease is lost: {reason}", file=sys.stderr, flush=True)
        os._exit(errors.EXIT_ERROR)


def _client() -> storage.Client:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client(project="none", credentials=credentials.AnonymousCredentials())
    return storage.Client()
