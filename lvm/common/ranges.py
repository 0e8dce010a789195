"""Byte ranges of many objects on gs://, s3:// and http:// at once, by TensorStore: retried, hedged, in any order.

Object stores answer most requests in tens of milliseconds, and one in a hundred in a second: a batch of a hundred
ranges would wait for the slowest of them at nearly every step. A range without an answer after a multiple of the usual
latency is requested again, and the first answer counts.
"""

import collections
import functools
import os
import queue
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore

_IN_FLIGHT = 128  # ranges requested at once by a call; as many again may be hedged
_MAX_REQUESTS = 4  # of a range
_TIMEOUT_S = 120.0  # for an answer to any of them
_QUANTILE, _HEDGE_FACTOR = 0.9, 1.5  # of recent latencies, after which a range is requested again
_MIN_HEDGE_S, _FIRST_HEDGE_S, _MAX_HEDGE_S = 0.02, 0.15, 5.0  # at least, before there are latencies, at most
# Of failed requests: 503, connections that end. TensorStore's own first delay, a second, would delay a whole batch.
_RETRIES = {"max_retries": 10, "initial_delay": "20ms", "max_delay": "8s"}
_CONCURRENCY = {"limit": 2 * _IN_FLIGHT}

_latencies: collections.deque[float] = collections.deque([_FIRST_HEDGE_S / _HEDGE_FACTOR], 512)  # s, of this process


class Range(NamedTuple):
    """Bytes [start, stop) of an object, such as gs://BUCKET/NAME; `stop` None means to its end."""

    path: str
    start: int = 0
    stop: int | None = None


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Reads all ranges. Safe to be called by several threads.

    Raises:
      FileNotFoundError: an object is missing.
      OSError: a range is beyond the end of its object, or couldn't be read after retries.
      TimeoutError: no answer within two minutes.
    """
    if not ranges:
        return []
    return _Batch(ranges).read()


class _Batch:
    """One call's requests."""

    def __init__(self, ranges: Sequence[Range]):
        self._ranges = ranges
        self._results: list[bytes | None] = [None] * len(ranges)
        self._futures: list[list[Any]] = [[] for _ in ranges]  # requests of each range that have not ended
        self._requests = [0] * len(ranges)  # begun
        self._ended: queue.SimpleQueue[tuple[int, float, Any]] = queue.SimpleQueue()
        self._due: collections.deque[tuple[float, int]] = collections.deque()  # when to request a range again
        usual = float(np.quantile(list(_latencies), _QUANTILE))
        self._delay = min(max(usual * _HEDGE_FACTOR, _MIN_HEDGE_S), _MAX_HEDGE_S)

    def read(self) -> list[bytes]:
        waiting, missing = collections.deque(range(len(self._ranges))), len(self._ranges)
        last = time.monotonic()  # time of the last answer
        try:
            while missing:
                while waiting and missing - len(waiting) < _IN_FLIGHT:
                    self._request(waiting.popleft())
                now = time.monotonic()
                if now - last > _TIMEOUT_S:
                    path = next(r.path for r, result in zip(self._ranges, self._results, strict=True) if result is None)
                    raise TimeoutError(f"{path}: no answer within {_TIMEOUT_S:g} s")
                timeout = self._due[0][0] - now if self._due else last + _TIMEOUT_S - now
                try:
                    answered = self._receive(max(0.0, timeout))
                except queue.Empty:
                    self._hedge(time.monotonic())
                    continue
                missing, last = missing - answered, time.monotonic()
        finally:
            for futures in self._futures:
                for future in futures:
                    future.cancel()
        return self._results  # type: ignore[return-value]

    def _request(self, i: int) -> None:
        path, start, stop = self._ranges[i]
        store, key = _open(path)
        begun = time.monotonic()
        future = store.read(key, byte_range=slice(start, stop))
        self._futures[i].append(future)
        self._requests[i] += 1
        if self._requests[i] < _MAX_REQUESTS:
            self._due.append((begun + self._delay, i))
        future.add_done_callback(lambda future: self._ended.put((i, begun, future)))

    def _hedge(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, i = self._due.popleft()
            if self._results[i] is None:
                self._request(i)

    def _receive(self, timeout: float) -> bool:
        """Takes the next end of a request; True if it answers a range."""
        i, begun, future = self._ended.get(timeout=timeout)
        if self._results[i] is not None:
            return False
        self._futures[i].remove(future)
        path = self._ranges[i].path
        try:
            result = future.result()
        except Exception as error:  # TensorStore's are of several types
            if self._futures[i]:
                return False  # another request may still be answered
            raise OSError(f"{path}: {error}") from error
        if result.state != "value":
            raise FileNotFoundError(path)
        _latencies.append(time.monotonic() - begun)
        self._results[i] = result.value
        for other in self._futures[i]:
            other.cancel()
        self._futures[i] = []
        return True


def _open(path: str) -> tuple[Any, str]:
    """The store of a path's bucket or host, and the path in it."""
    scheme, rest = path.split("://", 1)
    bucket, key = rest.split("/", 1)
    return _open_bucket(scheme, bucket), key


@functools.lru_cache(maxsize=64)
def _open_bucket(scheme: str, bucket: str) -> Any:
    spec: dict[str, Any] = {"gs": {"driver": "gcs", "bucket": bucket}, "s3": {"driver": "s3", "bucket": bucket}}.get(
        scheme, {"driver": "http", "base_url": f"{scheme}://{bucket}/"}
    )
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):  # which TensorStore doesn't read
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:  # by default it looks for ~/.aws first, with five errors
        spec |= {"aws_credentials": {"type": "environment"}}
    return tensorstore.KvStore.open(spec, context=_context()).result()


@functools.cache
def _context() -> Any:
    kinds = ("gcs", "s3", "http")
    retries = {f"{kind}_request_retries": _RETRIES for kind in kinds}
    return tensorstore.Context(retries | {f"{kind}_request_concurrency": _CONCURRENCY for kind in kinds})
