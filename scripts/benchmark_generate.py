"""Speed of reading prompts and writing answers beside transformers' `generate`: the same weights, one table.

    python -m scripts.benchmark_generate --size=1b                       an accelerator
    JAX_PLATFORMS=cpu python -m scripts.benchmark_generate --size=100m   a CPU

Weights are random, written once as transformers' Llama, and loaded by both. Each contender has a process of its own,
one after the other. Decoding is timed from an early token of an answer to its last, after `--cached` tokens were read.
The exit code is 1 where ours gave no figure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from lvm.common import cli, errors
from lvm.common.errors import UserError
from lvm.hardware import accelerators
from lvm.inference.generator import Generator, SamplingParams
from lvm.interop import models, tensors
from lvm.interop.lazy_checkpoint import NO_RECORD, LazyCheckpoint, tensor_shapes
from lvm.model.transformer import SIZES, ModelConfig
from lvm.model.vocabulary import Vocabulary
from scripts.contenders import Report, contend, cpu_name, run_job

CODES = 8192
_LOOKS = 4  # at an answer of ours while it is written
_TITLES = (
    "contender",
    "rows",
    "prefill tokens/s",
    "ms a token",
    "best",
    "decode tokens/s",
    "GB/s",
    "of the memory's",
)


def _run(args: cli.Args) -> None:
    if args.job:
        run_job(json.loads(args.job), run_ours, "scripts.peer_torch_generate")
        return
    if args.size not in SIZES:
        raise UserError(f"--size: {args.size!r} is not one of {', '.join(SIZES)}")
    ends, load = time.monotonic() + 60 * args.minutes, os.getloadavg()
    records: list[dict[str, Any]] = []
    contenders = ["ours", *([args.peer] if args.peer != "none" else [])]
    with tempfile.TemporaryDirectory() as folder:
        write_weights(pathlib.Path(folder, "model"), args.size)
        for number, name in enumerate(contenders):
            machine = next((record for record in records if "platform" in record), None)
            if name != "ours" and machine is None:
                records.append({"contender": name, "failed": "not run: ours didn't start"})
                continue
            print(f"== {args.size}, {name}")
            job = {
                "contender": name,
                "folder": f"{folder}/model",
                "batch_sizes": [int(size) for size in args.batch_sizes],
                "cached": args.cached,
                "tokens": args.tokens,
                "repeats": args.repeats,
                "dtype": args.dtype,
                "caches": args.caches,
                "machine": machine,
            }
            limit = max(0.1, (ends - time.monotonic()) / (len(contenders) - number))
            found = contend("scripts.benchmark_generate", job, limit)
            records += [{"contender": name, **record} for record in found]
    print("\n" + "\n".join(_about(args, records, load)))
    print("\n" + table(records))
    for line in verdicts(records):
        print(line)
    ours = {record["rows"] for record in records if record["contender"] == "ours" and "rows" in record}
    if ours != {int(size) for size in args.batch_sizes}:
        sys.exit(errors.EXIT_ERROR)


def write_weights(folder: pathlib.Path, size: str) -> None:
    """Random weights of a size, float32, as transformers' Llama."""
    vocabulary = Vocabulary.for_codes(CODES)
    config = dataclasses.replace(SIZES[size], vocabulary_size=vocabulary.size, dtype="float32")
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        return config.init_std * rng.standard_normal(shape, dtype=np.float32)

    drawn = {name: tensors.from_array(draw(name, shape)) for name, shape in tensor_shapes(config).items()}
    models.write(folder, LazyCheckpoint(config, vocabulary, drawn, NO_RECORD, 0, str(folder)), "hf")


def prompts(rows: int, cached: int) -> np.ndarray:
    """The prompts of every contender: codes int32 [rows, cached]."""
    return np.random.default_rng(rows).integers(0, CODES, (rows, cached), dtype=np.int32)


Marks = list[tuple[int, float]]  # tokens written so far, and when
Write = Callable[
    [np.ndarray, int], tuple[np.ndarray, Marks]
]  # prompts, tokens → new tokens [rows, tokens], marks


def measure(variant: str, job: dict[str, Any], rows: int, write: Write) -> dict[str, Any]:
    """Times calls of `write` after one that warms up: decoding from their first mark to their last."""
    given, steps, prefills = prompts(rows, job["cached"]), [], []
    write(given, job["tokens"])
    for _ in range(job["repeats"]):
        start = time.perf_counter()
        answer, marks = write(given, job["tokens"])
        (early, first), (late, last) = marks[0], marks[-1]
        steps.append((last - first) / (late - early))
        prefills.append(
            first - start - (early - 1) * steps[-1]
        )  # the first token comes with the prompt's reading
    step = statistics.median(steps)
    print(f"{variant}, {rows} rows: {1000 * step:.2f} ms a token")
    return {
        "variant": variant,
        "rows": rows,
        "prefill": rows * job["cached"] / statistics.median(prefills),
        "milliseconds": 1000 * step,
        "best": 1000 * min(steps),
        "decode": rows / step,
        "answer": answer.tolist(),
    }


def run_ours(job: dict[str, Any], report: Report) -> None:
    """`LVM` of the folder, at every batch size."""
    device = jax.devices()[0]
    dtype = job["dtype"]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    checkpoint = models.read(job["folder"])
    config = dataclasses.replace(checkpoint.config, dtype=dtype)
    generator = Generator(config, checkpoint.load_params())
    libraries = f"jax {jax.__version__}"
    report(
        {"platform": device.platform, "device": device.device_kind, "dtype": dtype, "libraries": libraries}
    )

    def write(given: np.ndarray, tokens: int) -> tuple[np.ndarray, Marks]:
        greedy, marks = SamplingParams(temperature=0.0), []
        seen = generator.stream(
            list(given), tokens, greedy, [0] * len(given), num_allowed=CODES, every=-(-tokens // _LOOKS)
        )
        for part in seen:
            marks.append((part.shape[-1], time.perf_counter()))
        return part[:, 0], marks

    for rows in job["batch_sizes"]:
        needed = traffic(config, rows, job["cached"] + job["tokens"] // 2)
        report({**measure("cache of fixed size", job, rows, write), "bytes": needed})


def traffic(config: ModelConfig, rows: int, cached: int) -> int:
    """Bytes that a step of decoding must read at least: every weight once but the embedding, and each row's cache."""
    sizes = {name: int(np.prod(shape)) for name, shape in tensor_shapes(config).items()}
    weights = sum(sizes.values()) - (0 if config.tie_embeddings else sizes["embedding"])
    cache = rows * cached * 2 * config.num_layers * config.kv_heads * config.head_dim
    return (weights + cache) * (2 if config.dtype == "bfloat16" else 4)


def _about(args: cli.Args, records: list[dict[str, Any]], load: tuple[float, ...]) -> list[str]:
    libraries = dict.fromkeys(record["libraries"] for record in records if "libraries" in record)
    lines = [", ".join([f"Python {platform.python_version()}", *libraries])]
    machine = next((record for record in records if "platform" in record), None)
    if machine is None:
        return lines
    before, after = (", ".join(f"{x:.1f}" for x in loads) for loads in (load, os.getloadavg()))
    name = cpu_name() if machine["platform"] == "cpu" else machine["device"]
    lines.append(f"{name}, {os.cpu_count()} cores, load {before} before and {after} after (1, 5, 15 minutes)")
    lines.append(
        f"{args.size} in {machine['dtype']}, {args.cached} tokens cached, then {args.tokens} written, greedy; "
        f"medians of {args.repeats} calls"
    )
    return lines


def _bandwidth(records: list[dict[str, Any]]) -> float:
    device = next((record["device"] for record in records if "device" in record), "")
    chip = accelerators.accelerator_of(SimpleNamespace(device_kind=device))
    return chip.hbm_bandwidth if chip else 0.0


def table(records: list[dict[str, Any]]) -> str:
    """A row for each contender, cache and batch size."""
    bandwidth = _bandwidth(records)
    lines: list[tuple[str, ...]] = [_TITLES]
    failed = []
    for record in records:
        if "failed" in record:
            failed.append(f"{record['contender']}: {record['failed']}")
        if "rows" not in record:
            continue
        speed = record["bytes"] / record["milliseconds"] * 1000 if "bytes" in record else 0.0
        lines.append(
            (
                f"{record['contender']}, {record['variant']}",
                str(record["rows"]),
                f"{record['prefill']:,.0f}",
                f"{record['milliseconds']:.2f}",
                f"{record['best']:.2f}",
                f"{record['decode']:,.1f}",
                f"{speed / accelerators.GIGA:.1f}" if speed else "",
                f"{speed / bandwidth:.0%}" if speed and bandwidth else "",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_TITLES))]
    padded = [
        "  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([*padded, *failed])


def verdicts(records: list[dict[str, Any]]) -> list[str]:
    """For each batch size: ours against the fastest peer, by medians and by the best calls; whether tokens agree."""
    lines = []
    for rows in sorted({record["rows"] for record in records if "rows" in record}):
        of_size = [record for record in records if record.get("rows") == rows]
        ours = next((record for record in of_size if record["contender"] == "ours"), None)
        peers = [record for record in of_size if record["contender"] != "ours"]
        if ours is None or not peers:
            lines.append(f"{rows} rows: nothing to compare")
            continue
        median, best = (min(peer[key] for peer in peers) / ours[key] for key in ("milliseconds", "best"))
        same = np.mean([np.equal(ours["answer"], peer["answer"]).mean() for peer in peers])
        lines.append(
            f"{rows} rows: decoding {median:.2f} × the fastest of transformers by medians, {best:.2f} × by the best "
            f"calls; {same:.1%} of the tokens are the same"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("size", "1b", f"one of {', '.join(SIZES)}")
    flags.comma_list("batch_sizes", ["1", "32"], "rows")
    flags.integer("cached", 1024, "tokens of a prompt", lower_bound=1)
    flags.integer("tokens", 64, "tokens that are written", lower_bound=2)
    flags.integer("repeats", 5, "calls that are timed", lower_bound=1)
    flags.enum("peer", "transformers", ["transformers", "none"], "what stands beside ours")
    flags.comma_list("caches", ["dynamic", "static"], "of transformers, each timed")
    flags.enum("dtype", "auto", ["auto", "bfloat16", "float32"], "auto is float32 on a CPU alone")
    flags.float("minutes", 9.0, "for all contenders; each has an even share of what is left")
    flags.string("job", "", "one contender's work: what the command passes to its own processes")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
