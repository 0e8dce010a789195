"""Progress of an encoder, for its log."""

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

from lvm.common.logging import Progress, log_info

T = TypeVar("T")

_LOG_EVERY_S = 10.0


class EncodingProgress:
    """Progress in scenes, images per second, and the shares of time spent waiting for images and for codes.

    The number of all scenes is estimated from the parts that are listed.
    """

    def __init__(self) -> None:
        self._progress, self._done = Progress(0, unit="scenes"), 0
        self._parts, self._listed_parts, self._scenes = 0, 0, 0
        self._reset()

    def expect(self, num_parts: int) -> None:
        """Counts parts that will be listed."""
        self._parts += num_parts

    def add_part(self, num_scenes: int) -> None:
        """Counts a listed part."""
        self._listed_parts, self._scenes = self._listed_parts + 1, self._scenes + num_scenes
        self._progress.total = round(self._scenes * max(1.0, self._parts / self._listed_parts))

    def _reset(self) -> None:
        self._start, self._images, self._waited_s = time.monotonic(), 0, {"host": 0.0, "device": 0.0}

    @contextlib.contextmanager
    def waiting(self, resource: str) -> Iterator[None]:
        """Counts the time inside as waiting for the "host" or the "device"."""
        start = time.monotonic()
        yield
        self._waited_s[resource] += time.monotonic() - start

    def timed(self, resource: str, items: Iterator[T]) -> Iterator[T]:
        """Yields the items; the time until each counts as waiting for `resource`."""
        while True:
            with self.waiting(resource):
                item = next(items, None)
            if item is None:
                return
            yield item

    def add(self, images: int, scenes: int) -> None:
        """Counts finished images and scenes; logs a line every few seconds."""
        self._images, self._done = self._images + images, self._done + scenes
        if time.monotonic() - self._start > _LOG_EVERY_S:
            log_info(self.line())

    def line(self) -> str:
        """`Progress.line`, with images/s and the shares of time waited since the previous line."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        shares = {resource: waited / seconds for resource, waited in self._waited_s.items()}
        line = (
            f"{self._progress.line(self._done)}, {self._images / seconds:.3g} images/s, "
            f"{max(shares, key=shares.__getitem__)}-bound: waited {shares['host']:.0%} of the time for images, "
            f"{shares['device']:.0%} for codes"
        )
        self._reset()
        return line
