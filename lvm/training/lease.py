"""A lease for a workdir on gs://, which has no file locks: an object that its holder keeps renewing."""

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
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from lvm.common import errors
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning

_TTL_S = 120.0  # a lease not renewed for this long is free
_RENEW_S = 30.0  # between renewals
_POLL_S = 5.0  # between looks at another run's lease
_WRITE_TIMEOUT_S = 10.0  # a write that hangs must not outlive the lease


class Lease:
    """Holds the `gs://` object `path` until the process ends or `release` is called.

    Every write requires the generation that it replaces, so of two concurrent writers one fails. A killed run leaves
    its lease behind; the next one waits until it has expired.

    Args:
      path: the object.
      ttl_s, renew_s, poll_s: lease TTL, and seconds between renewals and polls; set by tests alone.

    Raises:
      UserError: another run holds and renews it.
    """

    def __init__(self, path: epath.PathLike, ttl_s: float = _TTL_S, renew_s: float = _RENEW_S, poll_s: float = _POLL_S):
        self._path, self._ttl_s, self._renew_s, self._poll_s = os.fspath(path), ttl_s, renew_s, poll_s
        bucket, _, name = self._path.removeprefix("gs://").partition("/")
        self._bucket, self._name = storage.Client().bucket(bucket), name
        self._owner = uuid.uuid4().hex
        self._released = threading.Event()
        self._generation = self._acquire()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Deletes the lease, so that the next run needn't wait."""
        if self._released.is_set():
            return
        self._released.set()
        try:
            self._bucket.blob(self._name).delete(if_generation_match=self._generation)
        except (exceptions.GoogleAPIError, requests.RequestException) as error:
            log_warning(f"{self._path}: not released ({error}); it expires in {self._ttl_s:.0f} s")

    def _acquire(self) -> int:
        seen, since = self._current_generation(), time.monotonic()
        if seen:
            log_info(
                f"{self._path}: held by another run, or one that was killed; waiting {self._ttl_s:.0f} s for it "
                "to be renewed or expire"
            )
        while True:
            if not seen or time.monotonic() - since > self._ttl_s:
                try:
                    return self._write(seen, DEFAULT_RETRY)
                except exceptions.PreconditionFailed:  # another run was faster, or only the response was lost
                    if self._is_ours():
                        return self._generation
                    raise self._held_error() from None
            time.sleep(self._poll_s)
            current = self._current_generation()
            if current and current != seen:
                raise self._held_error()
            seen = current

    def _held_error(self) -> UserError:
        return UserError(f"{self._path.rpartition('/')[0]}: another run is using this workdir")

    def _current_generation(self) -> int:
        """The object's generation, 0 if there is none."""
        blob = self._bucket.get_blob(self._name)
        return int(blob.generation) if blob else 0

    def _write(self, replaced: int, retry: Retry | None) -> int:
        blob = self._bucket.blob(self._name)  # a new one: a blob with a generation requests that one alone
        blob.upload_from_string(self._owner, if_generation_match=replaced, timeout=_WRITE_TIMEOUT_S, retry=retry)
        return int(blob.generation)

    def _is_ours(self) -> bool:
        """Checks whether this lease wrote the object; if so continues from its generation."""
        blob = self._bucket.get_blob(self._name)
        if blob is None or blob.download_as_bytes(timeout=_WRITE_TIMEOUT_S) != self._owner.encode():
            return False
        self._generation = int(blob.generation)
        return True

    def _renew(self) -> None:
        renewed_at = time.monotonic()
        while not self._released.wait(self._renew_s):
            started_at = time.monotonic()
            try:
                try:
                    self._generation = self._write(self._generation, retry=None)  # this loop retries
                except exceptions.PreconditionFailed:
                    if not self._released.is_set() and not self._is_ours():
                        self._exit("another run has taken it")
                renewed_at = started_at
            except (exceptions.GoogleAPIError, requests.RequestException) as error:
                # Exits before the lease expires, not after.
                if time.monotonic() - renewed_at > self._ttl_s - self._renew_s - _WRITE_TIMEOUT_S:
                    self._exit(f"it could not be renewed: {error}")

    def _exit(self, reason: str) -> None:
        """Ends the process at once: two runs must never write to one workdir."""
        print(f"error: {self._path}: the lease is lost: {reason}", file=sys.stderr, flush=True)
        os._exit(errors.EXIT_ERROR)
