"""Benchmark of training's reads from object storage: an object server on this machine with faults.

    python -m scripts.benchmark_remote              latencies of batches, bytes, equality with local disk
    python -m scripts.benchmark_remote --opening    3e7 scenes in 7,000 shards opened

The server delays each answer by 50 ms and 1 % of them by a second, and answers 5 % with 503 and 1 % not at all.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lvm.common import cli, files
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.data.mixture.rows import Rows
from lvm.data.store import format, manifest
from lvm.model.vocabulary import Vocabulary
from scripts import benchmark_store
from scripts.peak_memory import peak_mib

FAULTS = {"latency_s": 0.05, "slow_share": 0.01, "slow_s": 1.0, "error_share": 0.05, "drop_share": 0.01}
BATCH, CONTEXT, ROWS = 512, 4096, 8
SMALL_BATCH, SMALL_CONTEXT = 64, 1024  # of the comparison: 250 grids


@contextlib.contextmanager
def served(folder: str | os.PathLike, faults: Mapping[str, float] = FAULTS) -> Iterator[dict[str, str]]:
    """An object server in a process of its own; yields the variables that point gs:// and s3:// to it.

    Args:
      folder: BUCKET/NAME in it are its objects.
      faults: fields of `tests.object_server.Faults`.
    """
    command = [sys.executable, "-m", "tests.object_server", os.fspath(folder)]
    command += [f"--{name}={value}" for name, value in faults.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())
        finally:
            server.kill()


def statistics(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """The counters of the server that these variables point to."""
    with urllib.request.urlopen(environment["TENSORSTORE_GCS_HTTP_URL"] + "/statistics") as response:
        return {"requests": 0, "bytes": 0} | json.load(response)


def make_rows(path: str, heldout_fraction: float = 0.0, context: int = CONTEXT, batch_size: int = BATCH) -> Rows:
    """Rows of single images."""
    config = MixtureConfig({"single": ComponentConfig(Single())}, (path,), heldout_fraction)
    return Rows(Mixture(config, 0), Vocabulary.for_codes(benchmark_store.NUM_CODES), context, batch_size)


def digest(rows: Rows, batches: int, hosts: int) -> str:
    """Hash of the first batches as `hosts` processes read them, all at once."""
    result = hashlib.sha256()
    (batch_size, *_) = rows.batch_spec["tokens"].shape
    parts = np.array_split(np.arange(batch_size), hosts)
    with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
        for step in range(batches):
            read = list(pool.map(lambda part, step=step: rows.batch(step, part), parts))
            for name in sorted(read[0]):
                result.update(np.concatenate([part[name] for part in read]).tobytes())
    return result.hexdigest()[:16]


def compare(local: str, remote: str, batches: int) -> None:
    """Prints the hash of batches from local disk, and from object storage by several numbers of hosts."""
    print(f"{batches} batches of {SMALL_BATCH} rows of {SMALL_CONTEXT}:")
    for hosts in (0, 1, 2, 4, 8):
        rows = make_rows(remote if hosts else local, context=SMALL_CONTEXT, batch_size=SMALL_BATCH)
        began = time.perf_counter()
        value = digest(rows, batches, hosts or 1)
        name = f"{hosts} hosts" if hosts else "local disk"
        print(f"  {name:<12}{value}{time.perf_counter() - began:8.1f} s", flush=True)


def measure_batches(count: int) -> None:
    """Prints the latencies of one host's rows, and the bytes fetched for them."""
    rows, seconds = make_rows("gs://bucket/store"), []
    before, start = statistics(), time.process_time()
    for step in range(count):
        began = time.perf_counter()
        rows.batch(step, np.arange(17 * ROWS, 18 * ROWS))
        seconds.append(time.perf_counter() - began)
    processor, after = time.process_time() - start, statistics()
    median, p99 = np.quantile(seconds, [0.5, 0.99])
    grids = count * (ROWS * CONTEXT // 258 + 1)
    print(f"{ROWS} of {BATCH} rows, {count} batches: median {median:.3f} s, p99 {p99:.3f} s")
    print(f"{processor / count:.3f} CPU-s a batch")
    print(
        f"requests {(after['requests'] - before['requests']) / grids:.2f} and bytes "
        f"{(after['bytes'] - before['bytes']) / grids / 512:.3f} of those used"
    )


def make_large(folder: pathlib.Path, shards: int, scenes: int) -> None:
    """Writes the manifest of a store of single images, and none of its shards."""
    hashes = np.random.default_rng(0).integers(0, 2**64, size=(shards, scenes // shards // 256), dtype=np.uint64) >> 8
    header = benchmark_store.header()
    entries = (
        {
            "name": format.shard_name(i, shards), "scenes": scenes // shards, "images": scenes // shards,
            "images_by_stream": {"rgb": scenes // shards}, "classes": [], "stream_sets": [["rgb"]],
            "runs": [[0, -1, 1, 0]], "codes_used": "ff", "group_hashes": [1, 2**64 - 1], "failures": {}, "streams": {},
            "heldout": {"groups": hashes[i].tolist(), "scenes": list(range(hashes.shape[1]))}, "versions": {},
            "sections": {name: {"bytes": 8, "crc32c": 0} for name in format.SECTIONS},
            "files": {f"{format.shard_name(i, shards)}.{kind}": {"sha256": "00" * 32} for kind in ("codes", "index")},
        }
        for i in range(shards)
    )  # fmt: skip
    folder.mkdir(parents=True)
    for name, content in manifest.build(folder, header, entries).items():
        files.write_atomically(folder / name, content)


def measure_opening() -> None:
    """Prints what opening the large store costs."""
    before, memory, began = statistics(), peak_mib(), time.perf_counter()
    rows = make_rows("gs://bucket/large", 0.001)
    Mixture(rows.mixture.config, 0, "heldout")
    seconds, after = time.perf_counter() - began, statistics()
    print(
        f"{rows.mixture.components[0].num_scenes:,} scenes: {seconds:.2f} s, {after['requests'] - before['requests']} "
        f"requests, {(after['bytes'] - before['bytes']) / 2**20:.1f} MiB, {peak_mib() - memory:.0f} MiB more at the "
        f"peak, {len(os.listdir('/proc/self/fd'))} descriptors"
    )


def _run(args: cli.Args) -> None:
    print(f"{os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}")
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, "bucket", "store")
        if args.opening:
            make_large(pathlib.Path(folder, "bucket", "large"), 7000, 30_000_000)
        else:
            local.mkdir(parents=True)
            benchmark_store.make_store(local, args.scenes, 1)
        with served(folder) as environment:
            os.environ.update(environment)
            if args.opening:
                measure_opening()
                return
            if args.batches:
                measure_batches(args.batches)
            if args.equal:
                compare(str(local), "gs://bucket/store", args.equal)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.boolean("opening", False, "open a store of 3e7 scenes instead")
    flags.integer("scenes", 100_000, "scenes of the store")
    flags.integer("batches", 200, "batches to measure", lower_bound=0)
    flags.integer("equal", 20, f"batches to compare, of {SMALL_BATCH} rows", lower_bound=0)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
