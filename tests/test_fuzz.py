"""The fuzzing harness: mutations are reproducible, and what must not pass doesn't."""

import time

import pytest

from tests.fuzz import check_mutations, mutate


def test_mutations_are_reproducible_single_changes() -> None:
    content = bytes(range(200)) * 10
    copies = list(mutate(content, 1, 400))
    assert copies == list(mutate(content, 1, 400)) != list(mutate(content, 2, 400))
    changes = [sum(a != b for a, b in zip(copy, content, strict=True)) for copy in copies if len(copy) == len(content)]
    assert set(changes) == {1}
    assert 0 < len(copies) - len(changes) < 40  # cut short
    assert len(set(copies)) > 350


def test_check_mutations_accepts_listed_failures_alone() -> None:
    def read(content: bytes, error: Exception) -> None:
        if len(content) != 20 or content[3] != 3:
            raise error

    content = bytes(range(20))
    refused = check_mutations(content, lambda c: read(c, KeyError("no key")), count=200, allowed=(KeyError,))
    assert 5 < refused < 100
    for error, message in [(ValueError("odd"), "ValueError: odd"), (KeyError(), "''"), (OSError("a\nb"), "one line")]:
        with pytest.raises(AssertionError, match=f"copy .*{message}"):
            check_mutations(content, lambda c, e=error: read(c, e), count=200, allowed=(KeyError, OSError))


def test_check_mutations_bounds_the_time() -> None:
    def read(content: bytes) -> None:
        start = time.process_time()
        while content[:1] != b"\0" and time.process_time() - start < 0.3:
            pass

    with pytest.raises(AssertionError, match=r"over 0\.2 s"):
        check_mutations(bytes(8), read, count=100, limit_s=0.2)
