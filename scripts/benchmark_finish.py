"""Benchmark of finishing a store of many shards on object storage, and of opening it.

    python -m scripts.benchmark_finish                  25,000 shards of 65,600 scenes, 50 ms a request
    python -m scripts.benchmark_finish --shards=7000

The storage is simulated in this process: entries are made on demand, each request takes the latency, and a listing one
request for a thousand names. Prints one line of JSON: seconds, CPU seconds, requests a shard, peak MB of the whole
process; for opening, seconds, requests, and the most MB allocated at a time.
"""

import json
import threading
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np

from lvm.common import cli, files
from lvm.data.store import writer
from lvm.data.store.format import SCENE_DTYPE, SECTIONS, VERSION, grid_bytes, section_offsets, shard_name
from lvm.data.store.reader import Store
from lvm.data.streams.codecs import Image
from scripts.peak_memory import peak_mib

FOLDER = "gs://bucket/store"
SCENES, CLASSES, KEY_BYTES, NUM_CODES, GRID = 65_600, 25, 16, 8192, 16
_PAGE = 1000  # names in an answer to a listing


class SimulatedStorage(fsspec.AbstractFileSystem):
    """Object storage that holds an encoding whose shards are complete.

    Attributes:
      requests: answered so far.
    """

    protocol = ("gs", "gcs")
    cachable = False
    num_shards, latency_s, requests = 0, 0.0, 0
    entry = b""  # of any shard, with "NAME" for its name
    written: dict[str, bytes] = {}  # noqa: RUF012 (as the store of fsspec's memory file system)
    _lock = threading.Lock()

    def _request(self, count: int = 1) -> None:
        with self._lock:
            type(self).requests += count
        time.sleep(count * self.latency_s)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._request()
        name = path.rpartition("/")[2]
        if name in self.written:
            return bytes(memoryview(self.written[name]))  # a copy, as from a connection
        if not name.startswith("shard-"):
            raise FileNotFoundError(path)
        return self.entry.replace(b"NAME", name.removesuffix(".json").encode())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._request()
        self.written[path.rpartition("/")[2]] = value

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._request()
        return {"name": path, "size": len(self.written[path.rpartition("/")[2]]), "type": "file"}

    def find(self, path: str, *arguments: Any, **options: Any) -> dict[str, dict[str, Any]]:
        sizes = {name: len(content) for name, content in self.written.items()}
        template = json.loads(self.entry)["files"]
        for i in range(self.num_shards):
            name = shard_name(i, self.num_shards)
            sizes[f"{name}.json"] = len(self.entry)
            sizes |= {file.replace("NAME", name): properties["bytes"] for file, properties in template.items()}
        self._request(-(-len(sizes) // _PAGE))
        return {f"{path}/{name}": {"name": name, "size": size, "type": "file"} for name, size in sizes.items()}


def make_entry() -> bytes:
    """The entry of a shard of `SCENES` scenes, one image each, of `CLASSES` classes and with 1 % failures."""
    rng = np.random.default_rng(0)
    scenes = np.zeros(SCENES, SCENE_DTYPE)
    scenes["group"], scenes["frames"] = rng.integers(0, 2**64, SCENES, np.uint64), 1
    scenes["first_grid"] = np.arange(SCENES)
    scenes["class_id"] = np.arange(SCENES) * CLASSES // SCENES
    classes = [f"n{i:08d}" for i in range(CLASSES)]
    summary = writer.summarize(scenes, classes, [("rgb",)], rng.integers(0, 9, NUM_CODES).astype(np.uint64))
    sizes = {
        "scenes": scenes.nbytes,
        "key_offsets": 4 * (SCENES + 1),
        "keys": KEY_BYTES * SCENES,
        "mark_offsets": 0,
        "marks": 0,
        "names": 400,
        "histogram": 8 * NUM_CODES,
    }
    *offsets, index_size = section_offsets(sizes[name] for name in SECTIONS)
    codes_size = SCENES * grid_bytes(GRID * GRID)
    entry = {
        "name": "NAME",
        **summary,
        "failures": {f"frame #: cause {letter}": 160 for letter in "abcd"},
        "streams": {},
        "versions": {"lvm": "0.1.0", "jax": "0.10", "pillow": "12"},
        "sections": {
            name: {"offset": offset, "bytes": sizes[name], "crc32c": int(rng.integers(2**32))}
            for name, offset in zip(SECTIONS, offsets, strict=True)
        },
        "files": {
            f"NAME{suffix}": {"bytes": size, "sha256": rng.bytes(32).hex()}
            for suffix, size in ((".codes", codes_size), (".index", index_size), (".failures.jsonl", 60_000))
        },
    }
    return files.json_bytes(entry)


def measure(num_shards: int, latency_s: float) -> dict[str, Any]:
    """Finishes and opens a store of this many shards."""
    storage = SimulatedStorage
    storage.num_shards, storage.latency_s, storage.entry = num_shards, latency_s, make_entry()
    header = {
        "tokenizer": {"weights": "random", "hash": "random", "grid": [GRID, GRID], "num_codes": NUM_CODES},
        "streams": {"rgb": Image().to_json()},
    }
    storage.written["header.json"] = files.json_bytes({"version": VERSION, **header, "num_shards": num_shards})
    fsspec.register_implementation("gs", storage, clobber=True)
    start, cpu_start = time.monotonic(), time.process_time()
    if missing := writer.finish_store(FOLDER):
        raise RuntimeError(f"{len(missing)} shards are missing")
    row: dict[str, Any] = {"shards": num_shards, "entry_bytes": len(storage.entry)}
    row |= {"finish_s": time.monotonic() - start, "finish_cpu_s": time.process_time() - cpu_start}
    row |= {"requests_per_shard": storage.requests / num_shards, "peak_mb": peak_mib()}
    row |= {f"{name}_bytes": len(content) for name, content in storage.written.items() if name.startswith("manifest")}
    storage.requests, start = 0, time.monotonic()
    tracemalloc.start()  # resident memory would not grow: what finishing has used is free again
    store = Store(FOLDER)
    row |= {"open_s": time.monotonic() - start, "open_requests": storage.requests, "scenes": len(store)}
    return row | {"open_mb": tracemalloc.get_traced_memory()[1] / 2**20}


def _run(args: cli.Args) -> None:
    row = measure(args.shards, args.latency_ms / 1000)
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.integer("shards", 25_000, "number of shards", lower_bound=1)
    flags.float("latency_ms", 50.0, "of each request", lower_bound=0.0)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
