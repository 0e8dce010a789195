"""Mutation fuzzing of readers: copies of a valid file with single bytes changed, and a check that all end well."""

import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from lvm.common.errors import UserError
from lvm.data.images.sources.image_file import UnreadableError

LISTED = (UnreadableError, UserError)  # what a source lists as a failure, and what ends a command with one line
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
_HEADER = 512  # bytes; half of the changes are in the first and last ones, where formats keep sizes and tables


def mutate(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yields `count` copies with one byte changed, or, one in 32, cut short; a pure function of the arguments."""
    rng = np.random.default_rng([seed, len(content)])
    for _ in range(count):
        near_ends = rng.random() < 0.5
        position = int(rng.integers(min(_HEADER, len(content)) if near_ends else len(content)))
        if near_ends and rng.random() < 0.25:
            position = len(content) - 1 - position
        if rng.random() < 1 / 32:
            yield content[:position]
            continue
        old = content[position]
        candidates = [value for value in (*_EXTREMES, old ^ (1 << int(rng.integers(8)))) if value != old]
        new = int(rng.choice(candidates)) if rng.random() < 0.75 else (old + int(rng.integers(1, 256))) % 256
        yield content[:position] + bytes([new]) + content[position + 1 :]


def check_mutations(
    content: bytes,
    read: Callable[[bytes], object],
    *,
    seed: int = 0,
    count: int = 1000,
    allowed: tuple[type[Exception], ...] = LISTED,
    limit_s: float = 5.0,
    mutations: Callable[[bytes, int, int], Iterator[bytes]] = mutate,
) -> int:
    """Reads mutated copies of a file; returns how many were refused.

    Args:
      content: a file that `read` accepts.
      read: reads a file's bytes, to the end: generators consumed, pixels decoded.
      seed: of the mutations.
      count: number of mutated copies.
      allowed: exceptions that count as a refusal; each must give its reason in one line.
      limit_s: limit of CPU seconds of all threads for each copy.
      mutations: yields the copies, as `mutate` does.

    Raises:
      AssertionError: another exception, or one copy took too long; the message tells how to get that copy.
    """
    read(content)
    num_refused = 0
    for index, mutated in enumerate(mutations(content, seed, count)):
        origin, reason = f"copy {index} of {mutations.__name__}({content[:8]!r}…, {seed}, {count})", None
        start = time.process_time()
        try:
            with warnings.catch_warnings(action="ignore"):
                read(mutated)
        except allowed as error:
            reason = str(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise AssertionError(f"{origin}: {type(error).__name__}: {error}") from error
        seconds = time.process_time() - start
        if reason is not None:
            num_refused += 1
            assert len(reason.splitlines()) == 1, f"{origin}: not a reason of one line: {reason!r}"
        assert seconds <= limit_s, f"{origin}: {seconds:.1f} s of CPU, over {limit_s} s"
    return num_refused
