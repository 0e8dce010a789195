"""The order of training images: a pure function of (seed, position) with windows that bound what is open at once.

Every epoch permutes the files (units of a `Catalog`). The rows of a batch are split into lanes of equal size; lane l of
L takes every L-th file of that order from the l-th on, and permutes the images of each window of W consecutive ones.
So a process opens only the files of its rows' lanes, and no more than 2·W of them for each lane. Within an epoch of a
lane every image of its files comes once. A batch mixes images of L·W files; where these are all files, the order is a
uniform permutation of all images.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lvm.common.errors import UserError
from lvm.common.seeding import derive_seed
from lvm.data.images.catalog import POOLS, Catalog, Listing
from lvm.data.mixture.permutation import permute

_MAX_LANES = 64
_LANE_UNITS = 16  # at least as many for each lane, or lanes would go over their files at different speeds
_KEPT_STEPS = 8  # in which an earlier window may still be asked for
_MAX_EMPTY_EPOCHS = 8


def num_lanes(num_rows: int, num_units: int, mixed_files: int) -> int:
    """Returns the lanes of so many rows of a batch, a function of the source and the configuration alone."""
    limit = min(_MAX_LANES, mixed_files, num_units // _LANE_UNITS)
    return max((lanes for lanes in range(1, limit + 1) if num_rows % lanes == 0), default=1)


class Window:
    """Images of a pool in some open units, in a seeded order. It is closed when nobody uses it.

    Attributes:
      start: position of its first image in the lane.
      size: number of its images.
    """

    def __init__(
        self, catalog: Catalog, pool: int, units: Sequence[int], listings: Sequence[Listing], start: int, seed: int
    ):  # fmt: skip
        self._catalog, self._pool, self._units, self._listings = catalog, pool, units, listings
        self._ends = np.cumsum([int(listing.counts[pool]) for listing in listings])
        self.start, self.size, self._seed, self._users = start, int(self._ends[-1]), seed, 1

    def images(self, indices: Int[np.ndarray, " n"]) -> list[tuple[bytes, int]]:
        """Returns the images at some indices of the window; see `Listing.image`."""
        permuted = permute(indices, self.size, self._seed)
        units = np.searchsorted(self._ends, permuted, side="right").tolist()
        starts = [0, *self._ends.tolist()]
        return [
            self._listings[u].image(self._pool, i - starts[u]) for u, i in zip(units, permuted.tolist(), strict=True)
        ]

    def hold(self) -> None:
        """Keeps the window open until another `close`."""
        self._users += 1

    def close(self) -> None:
        """Ends a use."""
        self._users -= 1
        if not self._users:
            for unit in self._units:
                self._catalog.release(unit)


class Lane:
    """An endless order of images of a pool, epoch after epoch. One thread at a time may use it.

    Args:
      lane, lanes: of `lanes` lanes, the one that it is.
      mixed_files: files that all lanes mix.
      num_rows: rows of a batch that it fills.
      seed: of the run.
    """

    def __init__(
        self, catalog: Catalog, pool: int, lane: int, lanes: int, mixed_files: int, num_rows: int, seed: int
    ):  # fmt: skip
        self._catalog, self._pool, self._lane, self._lanes, self._seed = catalog, pool, lane, lanes, seed
        self._window_units, self._num_rows = max(1, mixed_files // lanes), num_rows
        self._open: list[Window] = []
        self._ahead: list[int] = []  # units that are listed before their turn
        self._go_to(0, 0)

    def locate(self, positions: Int[np.ndarray, " n"]) -> list[tuple[Window, bytes, int]]:
        """Returns the images at ascending positions: their window, held, and as `Listing.image` does.

        Raises:
          UserError: there are no images.
        """
        located: list[tuple[Window, bytes, int]] = []
        while len(positions):
            window = self._window_at(int(positions[0]))
            inside = positions[positions < window.start + window.size]
            for scene, index in window.images(inside - window.start):
                window.hold()
                located.append((window, scene, index))
            positions = positions[len(inside) :]
        last, kept = located[-1][0], _KEPT_STEPS * self._num_rows
        first, end = last.start - kept, last.start + last.size + kept
        for window in [w for w in self._open if w.start + w.size < first or w.start > end]:
            self._open.remove(window)
            window.close()
        return located

    def close(self) -> None:
        """Closes what is open."""
        for window in self._open:
            window.close()
        for unit in self._ahead:
            self._catalog.release(unit)
        self._open, self._ahead = [], []

    def _go_to(self, epoch: int, start: int) -> None:
        """Begins an epoch at a position."""
        self._epoch, self._epoch_start, self._next, self._end = epoch, start, 0, start
        self._windows = self._epoch_windows(epoch)

    def _epoch_windows(self, epoch: int) -> list[list[int]]:
        num_units, size = self._catalog.num_units, self._window_units
        order = permute(np.arange(num_units), num_units, derive_seed(self._seed, self._pool, epoch))
        units = order[self._lane :: self._lanes].tolist()
        return [units[i : i + size] for i in range(0, len(units), size)]

    def _window_at(self, position: int) -> Window:
        for window in self._open:
            if window.start <= position < window.start + window.size:
                return window
        if position < self._end:
            self._go_to(0, 0)
        empty_epochs = 0
        while True:
            if self._next == len(self._windows):
                size = self._end - self._epoch_start
                empty_epochs += not size
                if empty_epochs > _MAX_EMPTY_EPOCHS or (not size and self._lanes == 1):
                    raise UserError(f"config.data: the train split has no image of {_NEEDS[self._pool]}")
                skipped = (position - self._end) // size if size and self._lanes == 1 else 0  # epochs of equal size
                self._go_to(self._epoch + 1 + skipped, self._end + skipped * size)
            if (opened := self._next_window(position)) is not None:
                return opened

    def _next_window(self, position: int) -> Window | None:
        """Passes the next window; opens it if it holds the position."""
        index, units, start = self._next, self._windows[self._next], self._end
        self._next += 1
        counts = self._catalog.known_counts(self._pool, units)
        if (counts >= 0).all() and position >= start + counts.sum():
            self._end += int(counts.sum())
            return None
        listings = [future.result() for future in [self._catalog.acquire(unit) for unit in units]]
        window = Window(
            self._catalog, self._pool, units, listings, start,
            derive_seed(self._seed, self._pool, self._epoch, self._lane, index),
        )  # fmt: skip
        self._end += window.size
        if position >= self._end:
            window.close()
            return None
        self._open.append(window)
        self._list_ahead()
        return window

    def _list_ahead(self) -> None:
        is_last = self._next == len(self._windows)
        following = self._epoch_windows(self._epoch + 1)[0] if is_last else self._windows[self._next]
        for unit in following:
            self._catalog.acquire(unit)
        for unit in self._ahead:
            self._catalog.release(unit)
        self._ahead = list(following)


class Located(NamedTuple):
    """An image of the order."""

    pool: int  # index in `POOLS`
    image: int  # its index among those of the pool in its scene
    scene: bytes  # pickled


class RowOrder:
    """The image of every row of every step; threads may share it.

    Args:
      pool_rows: the number of rows of a batch that each of `POOLS` has; rgb comes first.
      mixed_files: files whose images a batch mixes.
    """

    def __init__(self, catalog: Catalog, pool_rows: Sequence[int], mixed_files: int, seed: int):
        self._make_lane = functools.partial(Lane, catalog, mixed_files=mixed_files, seed=seed)
        self._first_rows = np.cumsum([0, *pool_rows])  # of each pool
        self._num_lanes = [num_lanes(rows, catalog.num_units, mixed_files) for rows in pool_rows]
        self._lane_rows = [rows // lanes for rows, lanes in zip(pool_rows, self._num_lanes, strict=True)]
        self._lanes: dict[tuple[int, int], Lane] = {}  # by pool and lane
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def images(self, step: int, rows: Int[np.ndarray, " n"], shift: int = 0) -> Iterator[list[Located]]:
        """A context in which the images of ascending rows, in their order, stay where workers read them.

        Args:
          shift: images later in the order.

        Raises:
          UserError: there are none.
        """
        windows: list[Window] = []
        located: list[Located] = []
        pools = np.searchsorted(self._first_rows, rows, side="right") - 1
        with self._lock:
            for pool in np.unique(pools).tolist():
                of_pool = rows[pools == pool]
                lanes, indices = np.divmod(of_pool - self._first_rows[pool], self._lane_rows[pool])
                for lane in np.unique(lanes).tolist():
                    of_lane = lanes == lane
                    positions = step * self._lane_rows[pool] + indices[of_lane] + shift
                    images = self._lane(pool, lane).locate(positions)
                    windows += [window for window, _, _ in images]
                    located += [Located(pool, index, scene) for _, scene, index in images]
        try:
            yield located
        finally:
            with self._lock:
                for window in windows:
                    window.close()

    def close(self) -> None:
        """Closes all lanes."""
        with self._lock:
            for lane in self._lanes.values():
                lane.close()

    def _lane(self, pool: int, lane: int) -> Lane:
        if (pool, lane) not in self._lanes:
            num_rows, lanes = self._lane_rows[pool], self._num_lanes[pool]
            self._lanes[pool, lane] = self._make_lane(pool=pool, lane=lane, lanes=lanes, num_rows=num_rows)
        return self._lanes[pool, lane]


_NEEDS = {
    POOLS.index("rgb"): "rgb; rgb_share=0 needs none",
    POOLS.index("others"): "a stream other than rgb; rgb_share=1 needs none",
}
