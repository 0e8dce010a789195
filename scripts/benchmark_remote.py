"""Benchmark of training's reads from object storage: an object server on this machine with faults.

    python -m scripts.benchmark_remote              latencies of batches, bytes, equality with local disk
    python -m scripts.benchmark_remote --opening    3e7 scenes in 7,000 shards opened

The server delays each answer by 50 ms and 1 % of them by a second, and answers 5 % with 503 and 1 % not at all.
"""

import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence

import numpy as np

from lvm.common import cli, files
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Single
from lvm.data.mixture.rows import Rows
from lvm.data.store import format, manifest
from lvm.model.vocabulary import Vocabulary
from scripts import benchmark_store

FAULTS = {"latency_s": 0.05, "slow_share": 0.01, "slow_s": 1.0, "error_share": 0.05, "drop_share": 0.01}
BATCH, CONTEXT, ROWS = 512, 4096, 8


def make_rows(path: str, heldout_fraction: float = 0.0) -> Rows:
    """Rows of single images."""
    config = MixtureConfig({"single": ComponentConfig(Single())}, (path,), heldout_fraction)
    return Rows(Mixture(config, 0), Vocabulary.for_codes(benchmark_store.NUM_CODES), CONTEXT, BATCH)


def digest(rows: Rows, batches: int, hosts: int) -> str:
    """Hash of the first batches as `hosts` processes read them."""
    result = hashlib.sha256()
    for step in range(batches):
        parts = [rows.batch(step, np.arange(BATCH * i // hosts, BATCH * (i + 1) // hosts)) for i in range(hosts)]
        for name in sorted(parts[0]):
            result.update(np.concatenate([part[name] for part in parts]).tobytes())
    return result.hexdigest()[:16]


def measure_batches(count: int) -> None:
    """Prints the latencies of one host's rows, and the bytes fetched for them."""
    rows, seconds = make_rows("gs://bucket/store"), []
    before, start = _statistics(), time.process_time()
    for step in range(count):
        began = time.perf_counter()
        rows.batch(step, np.arange(17 * ROWS, 18 * ROWS))
        seconds.append(time.perf_counter() - began)
    processor, after = time.process_time() - start, _statistics()
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
    before, memory, began = _statistics(), _peak_mib(), time.perf_counter()
    rows = make_rows("gs://bucket/large", 0.001)
    Mixture(rows.mixture.config, 0, "heldout")
    seconds, after = time.perf_counter() - began, _statistics()
    print(
        f"{rows.mixture.components[0].num_scenes:,} scenes: {seconds:.2f} s, {after['requests'] - before['requests']} "
        f"requests, {(after['bytes'] - before['bytes']) / 2**20:.1f} MiB, {_peak_mib() - memory:.0f} MiB more at the "
        f"peak, {len(os.listdir('/proc/self/fd'))} descriptors"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _statistics() -> dict[str, int]:
    with urllib.request.urlopen(os.environ["TENSORSTORE_GCS_HTTP_URL"] + "/statistics") as response:
        return {"requests": 0, "bytes": 0} | json.load(response)


def _run(args: cli.Args) -> None:
    print(f"{os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}")
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, "bucket", "store")
        if args.opening:
            make_large(pathlib.Path(folder, "bucket", "large"), 7000, 30_000_000)
        else:
            local.mkdir(parents=True)
            benchmark_store.make_store(local, args.scenes, 1)
        command = [sys.executable, "-m", "tests.object_server", folder]
        command += [f"--{name}={value}" for name, value in FAULTS.items()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                os.environ.update(json.loads(server.stdout.readline()))
                if args.opening:
                    measure_opening()
                    return
                measure_batches(args.batches)
                digests = {digest(make_rows(str(local)), args.equal, 1)}
                digests |= {digest(make_rows("gs://bucket/store"), args.equal, hosts) for hosts in (1, 2, 4, 8)}
                print(f"{args.equal} batches on local disk, and by 1, 2, 4 and 8 hosts: {' '.join(sorted(digests))}")
            finally:
                server.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.boolean("opening", False, "open a store of 3e7 scenes instead")
    flags.integer("scenes", 100_000, "scenes of the store")
    flags.integer("batches", 200, "batches to measure")
    flags.integer("equal", 20, "batches to compare, of 512 rows")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
