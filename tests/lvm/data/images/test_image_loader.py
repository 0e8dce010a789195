"""Scenes kept by several threads and processes at once, with and without file locks."""

import concurrent.futures
import errno
import multiprocessing

import numpy as np
import pytest

from lvm.data.images.image_loader import SceneCache

SCENES, KEPT, SIZE = 40, 10, 100


def fill(cache: SceneCache) -> None:
    for i in range(SCENES):
        cache.get(f"scene {i}", (SIZE,), lambda i=i: np.full(SIZE, i, np.uint8))


def num_kept(folder, cache: SceneCache) -> int:
    """The number of scenes on disk, each read back and compared."""
    kept = [path for path in folder.glob("??/*") if not path.name.startswith(".")]
    values = [cache.get(f"scene {i}", (SIZE,), lambda: None) for i in range(SCENES)]
    assert all((value == i).all() for i, value in enumerate(values) if value is not None)
    assert sum(value is not None for value in values) == len(kept)
    return len(kept)


@pytest.mark.parametrize("has_locks", [True, False])
def test_cache_of_threads_keeps_its_limit(has_locks, no_file_locks, tmp_path):
    if not has_locks:
        no_file_locks(errno.ENOLCK)
    cache = SceneCache(tmp_path, (KEPT + 0.5) * SIZE / 1e9)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(fill, cache) for _ in range(8)]:
            future.result()
    assert 1 <= num_kept(tmp_path, cache) <= KEPT


def test_cache_of_processes_keeps_its_limit(tmp_path):
    cache = SceneCache(tmp_path, (KEPT + 0.5) * SIZE / 1e9)
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        pool.map(fill, [cache] * 4)
    assert 1 <= num_kept(tmp_path, cache) <= KEPT


def test_cache_keeps_what_fits_beside_a_scene_that_does_not(tmp_path):
    cache = SceneCache(tmp_path, (KEPT + 0.5) * SIZE / 1e9)
    cache.get("large", (20 * SIZE,), lambda: np.zeros(20 * SIZE, np.uint8))
    fill(SceneCache(tmp_path, (KEPT + 0.5) * SIZE / 1e9))
    assert len([*tmp_path.glob("??/*")]) == KEPT
