"""Benchmark of the data loader, from stores to batches ready for a device: `python -m scripts.benchmark_data`.

Writes stores of random codes, mixes five recipes, and reads batches through the training loader. The same run reads
sentences of the same lengths from LVM's JSONL, as LVM's own loader does (line by line, base64, lists of Python
integers) and, as a stricter peer, with numpy.
"""

import base64
import functools
import json
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.data.mixture import loader
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import Category, MultiAnnotation, Pairs, Single, Video
from lvm.data.mixture.rows import Rows
from lvm.data.mixture.split import group_hash
from lvm.data.store import jsonl
from lvm.data.store.format import Scene
from lvm.data.store.writer import write_manifest, write_shard
from lvm.data.streams.codecs import Edges, Image
from lvm.model.vocabulary import Vocabulary

NUM_CODES, GRID = 8192, (16, 16)
STREAMS = ("rgb", "depth", "edges", "normals", "segmentation")
VOCABULARY = Vocabulary.for_codes(NUM_CODES)
# (store, its scenes at scale 1, frames, streams)
STORES = (("images", 256_000, 1, 1), ("annotated", 20_000, 1, 5), ("videos", 600, 160, 1))


def _run(args: cli.Args) -> None:
    if args.workers < 0 or min(args.seconds, args.context, args.batch_size, args.scenes) <= 0:
        raise UserError("--workers must not be negative, the other flags must be positive")
    print(f"load before: {_load()}; {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them allowed")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_stores(pathlib.Path(folder), args.scenes)
        lines = write_lines(pathlib.Path(folder), args.context)
        for packing in ("concat", "whole"):
            _first_batches(args, folder, packing)
        ours = {
            f"{packing}, shuffle {shuffle}": _ours(args, folder, packing, shuffle)
            for packing in ("concat", "whole")
            for shuffle in ("all", "blocks")
        }
        rate = measure(args, lambda: read_like_lvm(lines, args.batch_size, args.context))
        strict = measure(args, lambda: read_with_numpy(lines, args.batch_size, args.context))
        print(f"JSONL as LVM's loader reads it: {rate:,.0f} tokens/s; with numpy from the line on: {strict:,.0f}")
        for name, tokens in ours.items():
            print(f"  {name}: {tokens / rate:.1f} × LVM's loader, {tokens / strict:.1f} × numpy's")
        _memory(args, folder)
    print(f"load after: {_load()}")


def make_stores(folder: pathlib.Path, scale: float) -> None:
    """Writes the stores of `STORES` below `folder`, with random codes."""
    rng = np.random.default_rng(0)
    for name, count, frames, streams in STORES:
        (folder / name).mkdir()
        count = max(64, int(count * scale))

        def scenes(name: str = name, count: int = count, shape: tuple[int, int] = (frames, streams)) -> Iterator:
            for index in range(count):
                codes = rng.integers(0, NUM_CODES, (*shape, GRID[0] * GRID[1]), dtype=np.uint16)
                key = f"{name} {index}"
                yield Scene(key, f"class {index % 40:02d}", STREAMS[: shape[1]], codes, group_hash(key))

        write_shard(folder / name, 0, 1, scenes(), NUM_CODES)
        codecs = {stream: (Edges() if stream == "edges" else Image()).to_json() for stream in STREAMS}
        header = {
            "tokenizer": {"weights": "random", "hash": "random", "grid": list(GRID), "num_codes": NUM_CODES},
            "streams": codecs,
        }
        write_manifest(folder / name, header, 1)


def make_rows(args: cli.Args, folder: str, packing: str, shuffle: str = "all") -> Rows:
    """Makes rows of five recipes, each with a fifth of the codes."""
    images, annotated, videos = (os.path.join(folder, name) for name, *_ in STORES)
    # 15 images with BOS and EOS are 3842 tokens, which leaves room for a single image in a row of whole sentences.
    components = {
        "single": ComponentConfig(Single(), store=(images,)),
        "category": ComponentConfig(Category(images=15), store=(images,)),
        "pairs": ComponentConfig(Pairs(target="depth", shots=7), store=(annotated,)),
        "multi_annotation": ComponentConfig(MultiAnnotation(num_streams=5, shots=3), store=(annotated,)),
        "video": ComponentConfig(Video(frames=15), store=(videos,)),
    }
    mixture = Mixture(MixtureConfig(components, weigh_by="codes", packing=packing, shuffle=shuffle), seed=0)
    return Rows(mixture, VOCABULARY, args.context, args.batch_size)


def write_lines(folder: pathlib.Path, context: int) -> pathlib.Path:
    """Writes 2000 sentences of `context` random codes as LVM's JSONL."""
    rng, path = np.random.default_rng(1), folder / "sentences.jsonl"
    with open(path, "w") as file:
        for _ in range(2000):
            file.write(jsonl.encode_line(rng.integers(0, NUM_CODES, (1, context))))
    return path


def read_like_lvm(path: pathlib.Path, batch_size: int, context: int) -> Iterator[np.ndarray]:
    """Makes batches as EasyLM's JsonDataset does by default: one process, Python lists, BOS and EOS added."""
    tokens: list[int] = []
    masks: list[float] = []
    size = batch_size * context
    for line in _lines_with_tell(path):
        codes = np.frombuffer(base64.b64decode(json.loads(line)["tokens"]), "i4").tolist()
        tokens.extend([VOCABULARY.bos, *codes, VOCABULARY.eos])  # type: ignore[list-item]
        masks.extend([1.0 for _ in range(len(codes) + 2)])
        while len(tokens) > size + 1:
            inputs = np.array(tokens[:size], np.int32).reshape(batch_size, -1)
            np.array(tokens[1 : size + 1], np.int32).reshape(batch_size, -1)
            np.array(masks[1 : size + 1], np.float32).reshape(batch_size, -1)
            yield inputs
            tokens, masks = tokens[size:], masks[size:]


def read_with_numpy(path: pathlib.Path, batch_size: int, context: int) -> Iterator[np.ndarray]:
    """The same without lists of Python integers: the cost of JSON and base64 alone."""
    size, arrays, num_tokens = batch_size * context, [], 0
    for line in _lines(path):
        arrays += [np.array([VOCABULARY.bos]), jsonl.decode_line(line), np.array([VOCABULARY.eos])]
        num_tokens += context + 2
        if num_tokens > size:
            stream = np.concatenate(arrays, dtype=np.int32)
            yield stream[:size].reshape(batch_size, -1)
            arrays, num_tokens = [stream[size:]], num_tokens - size


def measure(args: cli.Args, make: Callable[[], Iterator[np.ndarray]]) -> float:
    """Tokens per second of an iterator of batches over `--seconds`, without the first few."""
    iterator = make()
    for _ in range(8):  # workers start, files enter the page cache
        next(iterator)
    start, tokens = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < args.seconds:
        tokens += next(iterator).size
    return tokens / elapsed


def _inputs(args: cli.Args, rows: Rows, start: int = 0) -> Iterator[np.ndarray]:
    for batch in loader.prefetch_batches(rows.batch, start, start + 10**6, args.workers):
        yield batch["tokens"][:, :-1]


def _ours(args: cli.Args, folder: str, packing: str, shuffle: str) -> float:
    rows = make_rows(args, folder, packing, shuffle)
    rate = measure(args, functools.partial(_inputs, args, rows))
    print(
        f"{packing}, shuffle {shuffle}, {args.workers} workers, context {args.context}, "
        f"{args.batch_size} rows: {rate:,.0f} tokens/s"
    )
    if packing == "whole":
        batch = rows.batch(0)
        print(f"  of which {np.mean(batch['segment_ids'] > 0):.1%} are not PAD")
    return rate


def _first_batches(args: cli.Args, folder: str, packing: str) -> None:
    for step in (0, 10**6):
        start = time.perf_counter()
        next(_inputs(args, make_rows(args, folder, packing), step))
        print(f"{packing}: first batch at step {step}: {time.perf_counter() - start:.2f} s, stores opened again")


def _memory(args: cli.Args, folder: str) -> None:
    """Reads sentences epoch after epoch and prints the resident memory after each tenth."""
    components = make_rows(args, folder, "concat").mixture.components
    single = next(component for component in components if component.name == "single")
    count, resident_mib = max(10_000, int(1_000_000 * min(1.0, args.scenes))), []
    for tenth in range(11):
        if tenth:
            for first in range((tenth - 1) * count // 10, tenth * count // 10, 1000):
                single.sentences(np.arange(first, first + 1000))
        resident_mib.append(f"{_resident() / 2**20:.0f}")
    print(f"MiB resident over {count:,} sentences of one image, by tenths: {', '.join(resident_mib)}")


def _resident() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    while True:
        with open(path, "rb") as file:
            yield from file


def _lines_with_tell(path: pathlib.Path) -> Iterator[str]:
    # LVM's loader calls `tell` after each line, to resume from there.
    while True:
        with open(path) as file:
            while line := file.readline():
                file.tell()
                yield line


def _load() -> str:
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("folder", None, "folder for the stores (default: a temporary one)")
    flags.integer("workers", 2, "reader processes; 0: threads")
    flags.integer("context", 4096, "inputs per row")
    flags.integer("batch_size", 512, "rows per batch; 512 of 4096 are two million tokens")
    flags.float("seconds", 10.0, "seconds per measurement")
    flags.float("scenes", 1.0, "scale of the stores, relative to 256,000 images")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
