"""Claims: independent processes divide named items of work by files that only one of them can create.

A claim is a file `ITEM.ATTEMPT`, which its process rewrites every 20 s. One that stays the same for 2 minutes, by the
clock of whoever looks, or whose process on the same machine has ended, is stale: the process that creates the file of
the next attempt takes the item over. No process changes a file of another one, and hosts need no common clock. A
process that was only paused may do its item a second time; items must allow that.
"""

import collections
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping

from etils import epath

from lvm.common import files
from lvm.common.logging import log_info, log_warning

TTL_S = 120.0  # a claim that isn't renewed for this long is stale
_RENEWALS = 6  # in this time


class Claims:
    """The claims of this process on items of a folder, as a context; leaving it gives up those that are held.

    Args:
      folder: local or gs://; created with the first claim.
      ttl_s: time until a claim is stale; set by tests alone.
    """

    def __init__(self, folder: epath.PathLike, ttl_s: float = TTL_S):
        self._folder, self._ttl_s, self._renew_s = epath.Path(folder), ttl_s, ttl_s / _RENEWALS
        owner = {"host": socket.gethostname(), "process": os.getpid(), "machine": _machine(), "id": uuid.uuid4().hex}
        self._content = json.dumps(owner).encode()
        self._held: dict[str, int] = {}  # attempt
        self._stale: dict[str, int] = {}  # attempt, as of the last `busy`
        self._seen: dict[str, tuple[float, float]] = {}  # by file: its time, and when that was first seen
        self._alive: set[str] = set()  # busy items whose process is known to run
        self._unproven: set[str] = set()  # the other busy ones
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "Claims":
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for item in [*self._held]:
            self.release(item)

    def busy(self) -> set[str]:
        """Items that other processes hold and renew, by one listing."""
        now, seen = time.monotonic(), {}
        self._stale, busy, alive = {}, set(), set()
        for item, attempts in _by_item(files.times(self._folder)).items():
            attempt, modified = max(attempts.items())
            name = f"{item}.{attempt}"
            last, since = self._seen.get(name, (modified, now))
            seen[name] = (modified, since if last == modified else now)
            if item in self._held:
                continue
            if self._is_stale(name, now - seen[name][1]):
                self._stale[item] = attempt
                continue
            busy.add(item)
            if item in self._alive or last != modified or self._is_running(name):
                alive.add(item)
        self._seen, self._alive, self._unproven = seen, alive, busy - alive
        return busy

    def is_unproven(self, item: str) -> bool:
        """True if an item was `busy`, but nothing shows yet that its process runs, such as a renewal."""
        return item in self._unproven

    def _is_stale(self, name: str, unchanged_s: float) -> bool:
        if unchanged_s > self._ttl_s:
            return True
        # Remote claims are read only if they are late: of hundreds, few are.
        is_suspect = unchanged_s > 2 * self._renew_s or not files.is_remote(self._folder)
        return is_suspect and _has_ended(files.read_side_file(self._folder / name))

    def _is_running(self, name: str) -> bool:
        """True if a local claim's process runs on this machine; False if that can't be told."""
        if files.is_remote(self._folder):
            return False
        owner = files.read_side_file(self._folder / name)
        return bool(owner) and owner["machine"] == _machine() != "" and not _has_ended(owner)

    def acquire(self, item: str) -> bool:
        """Claims an item that is not `busy`; False if another process is faster."""
        attempt = self._stale.get(item, -1) + 1
        if not attempt and not files.is_remote(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            if not files.create(self._folder / f"{item}.{attempt}", self._content):
                return False
        except FileNotFoundError:  # another process has removed the folder, since all items are done
            return False
        if attempt:
            owner = files.read_side_file(self._folder / f"{item}.{attempt - 1}")
            log_info(f"{self._folder / item}: taken over from {describe_owner(owner)}")
        with self._lock:
            self._held[item] = attempt
        return True

    def release(self, item: str) -> None:
        """Ends the claim on an item, done or given up."""
        with self._lock:  # a renewal would bring the file back
            attempt = self._held.pop(item)
        for i in range(attempt + 1):
            (self._folder / f"{item}.{i}").unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._closed.wait(self._renew_s):
            for item in [*self._held]:
                with self._lock:
                    if (attempt := self._held.get(item)) is None:
                        continue
                    try:
                        files.write_atomically(self._folder / f"{item}.{attempt}", self._content)
                    except (
                        Exception
                    ) as error:  # storage libraries raise types of their own; the next renewal may succeed
                        log_warning(f"{self._folder / item}: the claim was not renewed: {error}")


def late_claims(folder: epath.PathLike) -> tuple[int, dict[str, tuple[float, str]]]:
    """The number of claims in a folder, and age in seconds and owner of those that are older than the TTL.

    Unlike `Claims.busy`, a single look, which relies on this host's clock.
    """
    items = {item: max(attempts.items()) for item, attempts in _by_item(files.times(folder)).items()}
    late = {}
    for item, (attempt, modified) in sorted(items.items()):
        if (age_s := time.time() - modified) > TTL_S:
            owner = files.read_side_file(epath.Path(folder) / f"{item}.{attempt}")
            late[item] = (age_s, describe_owner(owner))
    return len(items), late


def describe_owner(owner: Mapping[str, object]) -> str:
    """`HOST, process 123` of a claim's content."""
    return f"{owner['host']}, process {owner['process']}" if owner else "a process that has ended"


def _by_item(times: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Times of the claims of each item, by attempt."""
    items: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for name, modified in times.items():
        item, _, attempt = name.rpartition(".")
        if item and attempt.isdecimal() and not item.startswith("."):
            items[item][int(attempt)] = modified
    return items


def _has_ended(owner: Mapping[str, object]) -> bool:
    """True if a claim's process was on this machine and is no more; False if it can't be told."""
    if not owner or not owner["machine"] or owner["machine"] != _machine():
        return False
    try:
        os.kill(int(str(owner["process"])), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@functools.cache
def _machine() -> str:
    """Identifies what process IDs are unique in: this boot of the machine, and the PID namespace; "" if unknown."""
    if sys.platform != "linux":
        return ""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
