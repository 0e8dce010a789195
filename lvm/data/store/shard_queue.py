"""Shards that processes of no common scheduler take one after another, each the next that is free."""

import collections
import contextlib
import math
import random
import time
from collections.abc import Iterable, Iterator

from etils import epath

from lvm.common import files
from lvm.common.claims import TTL_S, Claims
from lvm.data.store import writer
from lvm.data.store.format import shard_name
from lvm.data.store.manifest import MANIFEST

CLAIMS = "claims"  # folder in the store
_MANIFEST = "manifest"  # item besides the shards
_POLL_S, _MAX_POLL_S = 1.0, 20.0
_LISTING_SHARE = 0.05  # of the time, for listings that keep the estimate of the remaining time up to date
_LISTINGS = 8  # that the estimate is computed from
_MAX_HELD = 3  # until a process knows its rate: one shard is written, one decoded, one listed
_MAX_MISSES = 8  # in a row, until what is known of the others' progress is brought up to date


class ShardQueue:
    """The missing shards of a store, claimed (`Claims`) as they are taken, as a context.

    Processes may come and go; a shard whose process is gone is taken by another one. Hundreds of processes choose
    shards at random so that they don't compete for the same ones. A process lists the store when it starts, when it has
    nothing more to take, and now and then to see how fast all are: near the end a slow one must not hold what others
    could do.

    Args:
      folder: the store, begun.
      num_shards: of the store.
      poll_s, ttl_s: first pause between looks at the shards of others, and time until a claim is stale; set by tests
        alone.
    """

    def __init__(self, folder: epath.PathLike, num_shards: int, poll_s: float = _POLL_S, ttl_s: float = TTL_S):
        self._folder, self._num_shards, self._poll_s = epath.Path(folder), num_shards, poll_s
        self._claims, self._pause_s = Claims(self._folder / CLAIMS, ttl_s), ttl_s / 6
        self._missing: set[int] = set()
        self._required: set[int] = set()
        self._held: set[int] = set()
        self._random = random.Random()
        self._start = self._last_completion = self._next_listing = time.monotonic()
        self._num_completed = 0
        self._listings = collections.deque[tuple[float, int]](maxlen=_LISTINGS)  # time, missing shards

    def __enter__(self) -> "ShardQueue":
        self._claims.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._claims.__exit__(*error)

    def passes(self) -> Iterator[Iterator[int]]:
        """Yields iterators over shards to write, and waits between them, until all shards of the store are complete.

        A shard is claimed when it is taken. A pass ends when nothing is free; near the end, when it would claim more
        than the shard in work, which an idle process can start at once. That is earlier for a slow process.
        """
        while self._wait():
            yield self._take()

    def complete(self, shard: int) -> None:
        """Ends the claim on a written shard."""
        self._give_up_complete(shard)
        self._last_completion, self._num_completed = time.monotonic(), self._num_completed + 1

    def _may_hold_more(self) -> bool:
        """False if others could be done soon after this process with the shards that it holds, and one more."""
        if not self._num_completed:
            return len(self._held) < _MAX_HELD
        return 2 * self._own_s() < self._remaining_s()

    def _own_s(self) -> float:
        """Seconds that this process will take for the shards that it holds, and one more."""
        seconds_each = (self._last_completion - self._start) / self._num_completed
        return (len(self._held) + 1) * seconds_each

    def _remaining_s(self) -> float:
        """Seconds until all processes together have written what is missing; infinite if unknown."""
        (start, missing_then), (end, missing) = self._listings[0], self._listings[-1]
        return missing * (end - start) / (missing_then - missing) if missing < missing_then else math.inf

    def postpone(self, shard: int) -> None:
        """Gives up a shard that a process on this machine writes although its claim was stale, and pauses."""
        self._give_up(shard)
        time.sleep(self._pause_s)

    def require(self, names: Iterable[str]) -> None:
        """Adds shards, by name, that exist but are damaged."""
        required = set(names)
        self._required = {i for i in range(self._num_shards) if self._name(i) in required}

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yields True in the one process that is to write the manifest, and removes the folder of claims after it.

        False while another process writes it, or if it is newer than all shards.
        """
        self._claims.busy()
        is_ours = self._claims.acquire(_MANIFEST)
        try:
            yield is_ours and not self._is_finished()
        finally:
            if is_ours:
                self._claims.release(_MANIFEST)
                with contextlib.suppress(OSError):  # another process makes a claim in it, and will remove it
                    (self._folder / CLAIMS).rmtree(missing_ok=True)

    def _is_finished(self) -> bool:
        times = files.times(self._folder)
        entries = (times.get(f"{self._name(i)}.json", math.inf) for i in range(self._num_shards))
        return times.get(MANIFEST, 0.0) >= max(entries)

    def _name(self, shard: int) -> str:
        return shard_name(shard, self._num_shards)

    def _give_up_complete(self, shard: int) -> None:
        self._required.discard(shard)
        self._missing.discard(shard)
        self._give_up(shard)

    def _give_up(self, shard: int) -> None:
        self._held.discard(shard)
        self._claims.release(self._name(shard))

    def _is_missing(self, shard: int) -> bool:
        return writer.read_shard_entry(self._folder, shard, self._num_shards) is None

    def _list(self) -> None:
        start = time.monotonic()
        names = set(writer.missing_shards(self._folder, self._num_shards))
        self._missing = {i for i in range(self._num_shards) if self._name(i) in names} | self._required
        end = time.monotonic()
        self._next_listing = end + (end - start) / _LISTING_SHARE
        self._listings.append((end, len(self._missing)))

    def _wait(self) -> bool:
        """Waits until a shard is free, True, or all are complete, False."""
        self._list()
        pause_s = self._poll_s
        while self._missing:
            for shard in self._free():
                if self._is_missing(shard):
                    return True
                self._missing.discard(shard)
            if self._missing:
                time.sleep(pause_s * self._random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, _MAX_POLL_S)
        return False

    def _free(self) -> list[int]:
        busy = self._claims.busy()
        return [shard for shard in self._missing - self._held if self._name(shard) not in busy]

    def _take(self) -> Iterator[int]:
        misses, free = 0, self._free()
        self._random.shuffle(free)
        while free:
            if self._held:
                if time.monotonic() >= self._next_listing:
                    self._list()
                busy = self._claims.busy()
                free = [shard for shard in free if shard in self._missing and self._name(shard) not in busy]
                if len(free) <= len(busy) or not self._may_hold_more():
                    return
            shard = free.pop()
            if self._claim(shard):
                misses = 0
                yield shard
            elif (misses := misses + 1) == _MAX_MISSES:
                self._list()
                misses, free = 0, self._free()
                self._random.shuffle(free)

    def _claim(self, shard: int) -> bool:
        if not self._claims.acquire(self._name(shard)):
            return False
        self._held.add(shard)
        if not self._is_missing(shard):  # completed since the store was listed
            self._give_up_complete(shard)
            return False
        return True
