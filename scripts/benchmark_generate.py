"""Benchmark of prefill and decoding beside transformers' `generate`: the same weights, one table.

    python -m scripts.benchmark_generate --size=1b                       on an accelerator
    JAX_PLATFORMS=cpu python -m scripts.benchmark_generate --size=100m   on a CPU

Weights are random, written once as transformers' Llama, and loaded by both. Each contender runs in its own process, one
after the other. Decoding is timed from an early token of the answer to its last, after a prefill of `--cached` tokens.
Exits with 1 if ours has no figure.
"""

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
_NUM_MARKS = 4  # timestamps within one of our answers
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
            results = contend("scripts.benchmark_generate", job, limit)
            records += [{"contender": name, **record} for record in results]
    print("\n" + "\n".join(_about(args, records, load)))
    print("\n" + table(records))
    for line in verdicts(records):
        print(line)
    ours = {record["rows"] for record in records if record["contender"] == "ours" and "rows" in record}
    if ours != {int(size) for size in args.batch_sizes}:
        sys.exit(errors.EXIT_ERROR)


def write_weights(folder: pathlib.Path, size: str) -> None:
    """Writes random float32 weights of a model size as transformers' Llama."""
    vocabulary = Vocabulary.for_codes(CODES)
    config = dataclasses.replace(SIZES[size], vocabulary_size=vocabulary.size, dtype="float32")
    rng = np.random.default_rng(0)

    def sample(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        return config.init_std * rng.standard_normal(shape, dtype=np.float32)

    weights = {name: tensors.from_array(sample(name, shape)) for name, shape in tensor_shapes(config).items()}
    models.write(folder, LazyCheckpoint(config, vocabulary, weights, NO_RECORD, 0, str(folder)), "hf")


def prompts(rows: int, cached: int) -> np.ndarray:
    """Prompts of all contenders: codes int32 [rows, cached]."""
    return np.random.default_rng(rows).integers(0, CODES, (rows, cached), dtype=np.int32)


Marks = list[tuple[int, float]]  # tokens generated so far, timestamp
# (prompts, num_tokens) → new tokens [rows, tokens], marks
Generate = Callable[[np.ndarray, int], tuple[np.ndarray, Marks]]


def measure(variant: str, job: dict[str, Any], rows: int, generate: Generate) -> dict[str, Any]:
    """Times calls of `generate` after a warm-up call: decoding from the first mark to the last."""
    prompt, steps, prefills = prompts(rows, job["cached"]), [], []
    generate(prompt, job["tokens"])
    for _ in range(job["repeats"]):
        start = time.perf_counter()
        answer, marks = generate(prompt, job["tokens"])
        (early, first), (late, last) = marks[0], marks[-1]
        steps.append((last - first) / (late - early))
        prefills.append(first - start - (early - 1) * steps[-1])  # the prefill gives the first token
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
    """Reports `LVM` of the job's folder at every batch size."""
    device = jax.devices()[0]
    dtype = job["dtype"]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    checkpoint = models.read(job["folder"])
    config = dataclasses.replace(checkpoint.config, dtype=dtype)
    generator = Generator(config, checkpoint.load_params())
    libraries = f"jax {jax.__version__}"
    report({"platform": device.platform, "device": device.device_kind, "dtype": dtype, "libraries": libraries})

    def generate(prompts: np.ndarray, tokens: int) -> tuple[np.ndarray, Marks]:
        greedy, marks = SamplingParams(temperature=0.0), []
        stream = generator.stream(
            list(prompts),
            tokens,
            greedy,
            [0] * len(prompts),
            num_allowed=CODES,
            every=-(-tokens // _NUM_MARKS),
        )
        for answer in stream:
            marks.append((answer.shape[-1], time.perf_counter()))
        return answer[:, 0], marks

    for rows in job["batch_sizes"]:
        step_bytes = traffic(config, rows, job["cached"] + job["tokens"] // 2)
        report({**measure("cache of fixed size", job, rows, generate), "bytes": step_bytes})


def traffic(config: ModelConfig, rows: int, cached: int) -> int:
    """Minimum bytes read by a decode step: every weight but the embedding once, and each row's KV cache."""
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
        f"{args.size} in {machine['dtype']}, {args.cached} tokens cached, then {args.tokens} generated, greedy; "
        f"medians of {args.repeats} calls"
    )
    return lines


def _bandwidth(records: list[dict[str, Any]]) -> float:
    device = next((record["device"] for record in records if "device" in record), "")
    chip = accelerators.accelerator_of(SimpleNamespace(device_kind=device))
    return chip.hbm_bandwidth if chip else 0.0


def table(records: list[dict[str, Any]]) -> str:
    """Formats a row for each contender, cache and batch size."""
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
    padded = ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*padded, *failed])


def verdicts(records: list[dict[str, Any]]) -> list[str]:
    """Compares ours with the fastest peer per batch size, by medians and by best calls, and the tokens of both."""
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
    flags.string("size", "1b", f"model size, one of {', '.join(SIZES)}")
    flags.comma_list("batch_sizes", ["1", "32"], "rows per call")
    flags.integer("cached", 1024, "prompt tokens", lower_bound=1)
    flags.integer("tokens", 64, "tokens to generate", lower_bound=2)
    flags.integer("repeats", 5, "timed calls", lower_bound=1)
    flags.enum("peer", "transformers", ["transformers", "none"], "peer to compare with")
    flags.comma_list("caches", ["dynamic", "static"], "caches of transformers to measure")
    flags.enum(
        "dtype",
        "auto",
        ["auto", "bfloat16", "float32"],
        "compute dtype; auto: float32 on a CPU, else bfloat16",
    )
    flags.float("minutes", 9.0, "time limit of all contenders, shared evenly")
    flags.string("job", "", "internal: the work of one contender, as JSON")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
