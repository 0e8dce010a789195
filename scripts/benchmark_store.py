"""Benchmark of random reads from stores, and of their memory.

    python -m scripts.benchmark_store                  100,000 scenes of 16 grids; memory at 10k, 100k and 1M scenes
    python -m scripts.benchmark_store --scale=0.01     the same with small stores

Rates are of one process on one core, by wall clock and by CPU time, which other load does not affect. The peer is a
copy from memory-mapped files with the same checks, also of files of which nothing is in the page cache, as of a store
that is larger than memory. Memory is measured in a fresh process per row, after the random reads.
"""

import json
import mmap
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lvm.common import cli
from lvm.data.mixture.split import group_hash
from lvm.data.store.format import CODES_SUFFIX, Scene
from lvm.data.store.grid_reads import GridReads, read_intact
from lvm.data.store.reader import Store
from lvm.data.store.writer import begin_store, finish_store, write_shard
from lvm.data.streams.codecs import Image
from scripts.contenders import cpu_name

NUM_CODES, GRID = 8192, 16
RATE_SCENES, RATE_FRAMES = 100_000, 16
MEMORY = [
    (10_000, 16),
    (100_000, 16),
    (1_000_000, 16),
    (10_000, 1),
    (100_000, 1),
    (1_000_000, 1),
]  # scenes, frames
_SHARDS, _BATCH, _ROUNDS = 4, 1000, 5


def header() -> dict[str, Any]:
    """The header of a store of random codes."""
    return {
        "tokenizer": {"weights": "random", "hash": "random", "grid": [GRID, GRID], "num_codes": NUM_CODES},
        "source": {"kind": "random"},
        "streams": {"rgb": Image().to_json()},
    }


def make_store(folder: pathlib.Path, scenes: int, frames: int) -> Store:
    """Writes a store of random codes."""
    begin_store(folder, header(), _SHARDS)
    codes = np.random.default_rng(0).integers(0, NUM_CODES, (997, frames, 1, GRID * GRID), dtype=np.uint16)

    def content(first: int, last: int) -> Iterator[Scene]:
        for index in range(first, last):
            key = f"scene-{index:09d}"
            yield Scene(key, "", ("rgb",), codes[index % len(codes)], group_hash(key))

    for shard in range(_SHARDS):
        part = content(scenes * shard // _SHARDS, scenes * (shard + 1) // _SHARDS)
        write_shard(folder, shard, _SHARDS, part, NUM_CODES)
    finish_store(folder)
    return Store(folder)


def rate(name: str, read: Callable[[np.ndarray], object], indices: np.ndarray, batch_size: int) -> str:
    """Reads the scenes at `indices`, `batch_size` at once; returns a line of the table."""
    wall, processor = time.perf_counter(), time.process_time()
    for start in range(0, len(indices), batch_size):
        read(indices[start : start + batch_size])
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    count = len(indices)
    return f"{name:<44} {count / wall:>12,.0f} {count / processor:>14,.0f}"


def rates(store: Store, count: int) -> list[str]:
    """Lines of the table: scenes per second, singly and in batches."""
    indices = np.random.default_rng(1).integers(0, len(store), count)
    frames = int(store.entries(indices[:1])["frames"][0])

    def singly(index: np.ndarray) -> None:
        store.scene(int(index[0]))

    def grids(batch: np.ndarray) -> None:
        frame_ids = np.tile(np.arange(frames), len(batch))
        store.grids(store.entries(batch).repeat(frames), frame_ids, np.zeros(len(frame_ids), np.int64))

    lines = [f"{'scenes of 16 grids, random, checked':<44} {'a second':>12} {'a core second':>14}"]
    lines.append(rate("Store.scene, singly", singly, indices, 1))
    lines.append(rate(f"Store.grids, all grids of {_BATCH} scenes at once", grids, indices, _BATCH))
    return lines


class _Mapped(GridReads):
    """Reads from memory-mapped files."""

    def __init__(self, store: Store, files: Sequence[np.ndarray], numbers: np.ndarray, grids: np.ndarray):
        super().__init__(store.shards, numbers, grids, store.codes_per_image)
        self._files = files

    def start(self) -> list:
        target, size = self._content.reshape(-1), self._content.shape[1]
        for key, count, row in zip(*(array.tolist() for array in self._reads), strict=True):
            number, grid = divmod(key, 2**32)
            target[row * size :][: count * size] = self._files[number][grid * size :][: count * size]
        return []


def peers(store: Store, count: int) -> list[str]:
    """Lines of the table of reads in place and from mapped files, in the page cache and not."""
    rng, lines = np.random.default_rng(3), []
    head = f"{_BATCH} scenes at once, grids of each"
    lines.append(f"{head:<44} {'a second':>12} {'cached':>8} {'bytes read a byte':>18}")
    paths = [os.fspath(store.path / f"{shard.entry['name']}{CODES_SUFFIX}") for shard in store.shards]
    for is_cached, frames in ((True, RATE_FRAMES), (False, RATE_FRAMES), (False, 1)):
        rounds = max(1, count // _BATCH) if is_cached else _ROUNDS
        for name, advice in (("pread", None), ("mapped", mmap.MADV_NORMAL), ("mapped, MADV_RANDOM", mmap.MADV_RANDOM)):
            seconds, bytes_read, reads = [], 0, None
            mapped = [_map(path, advice or mmap.MADV_NORMAL) for path in paths]
            for _ in range(rounds):
                if not is_cached:
                    mapped, reads = [], None  # what is mapped stays in the cache
                    mapped = [_map(path, advice or mmap.MADV_NORMAL, drop=True) for path in paths]
                entries = store.entries(rng.integers(0, len(store), _BATCH)).repeat(frames)
                grids = entries["first_grid"] + np.tile(np.arange(frames), _BATCH)
                before, start = _bytes_read(), time.perf_counter()
                if advice is None:
                    reads = GridReads(store.shards, entries["shard"], grids, store.codes_per_image)
                else:
                    reads = _Mapped(store, mapped, entries["shard"], grids)
                read_intact(reads)
                seconds.append(time.perf_counter() - start)
                bytes_read += _bytes_read() - before
            used = rounds * len(grids) * 2 * store.codes_per_image
            label = f"  {frames}, {name}"
            rate = _BATCH / np.median(seconds)
            lines.append(f"{label:<44} {rate:>12,.0f} {'yes' if is_cached else 'no':>8} {bytes_read / used:>18.1f}")
    return lines


def _map(path: str, advice: int, drop: bool = False) -> np.ndarray:
    """Maps a file; `drop` takes its pages, which must be on disk, out of the page cache first."""
    with open(path, "rb") as file:
        if drop:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    content.madvise(advice)
    return np.frombuffer(content, np.uint8)


def _bytes_read() -> int:
    """Bytes that this process had to be read from a disk."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def memory(folder: str, count: int) -> dict[str, float]:
    """Resident MiB of this process: before opening, after, after reads; `own` is the part that no file backs."""
    resident = {"before": _resident("VmRSS")}
    store = Store(folder)
    resident["opened"] = _resident("VmRSS")
    indices = np.random.default_rng(2).integers(0, len(store), count)
    for start in range(0, count, _BATCH):
        batch = indices[start : start + _BATCH]
        store.grids(store.entries(batch), np.zeros_like(batch), np.zeros_like(batch))
    return resident | {"read": _resident("VmRSS"), "own": _resident("RssAnon")}


def _resident(field: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _run(args: cli.Args) -> None:
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args.reads)))
        return
    scale, reads = args.scale, max(100, int(args.reads * args.scale))
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}")
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        store = make_store(pathlib.Path(folder, "rates"), int(RATE_SCENES * scale), RATE_FRAMES)
        stored_bytes = sum(file["bytes"] for shard in store.shards for file in shard.entry["files"].values())
        minimum_bytes = len(store) * (512 * RATE_FRAMES + len("scene-000000000"))
        print(
            f"{len(store):,} scenes of {RATE_FRAMES} grids: {stored_bytes / minimum_bytes - 1:.2%} over 512 bytes per "
            "grid and the keys, index included"
        )
        print("\n" + "\n".join(rates(store, reads)))
        print("\n" + "\n".join(peers(store, reads)))
        print(f"\n{'MiB resident':<32} {'before':>8} {'opened':>8} {'read':>8} {'of it own':>10}")
        for index, (scenes, frames) in enumerate(MEMORY):
            path = pathlib.Path(folder, f"memory-{index}")
            count = len(make_store(path, int(scenes * scale), frames))
            command = [
                sys.executable,
                "-m",
                "scripts.benchmark_store",
                f"--memory_of={path}",
                f"--reads={reads}",
            ]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            columns = f"{row['before']:>8.0f} {row['opened']:>8.0f} {row['read']:>8.0f} {row['own']:>10.0f}"
            print(f"{f'{count:,} scenes of {frames}':<32} {columns}")
            for file in path.iterdir():
                file.unlink()
    print(f"load after {', '.join(f'{x:.1f}' for x in os.getloadavg())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.float("scale", 1.0, "scale of the numbers of scenes and reads")
    flags.integer("reads", 50_000, "random reads per row")
    flags.string("folder", "", "folder for the stores, about 10 GB at most (default: a temporary one)")
    flags.string("memory_of", "", "internal: measure this store in this process")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
