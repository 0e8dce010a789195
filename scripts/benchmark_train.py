"""Benchmark of the training step beside transformers' Llama in torch: same shapes, same tokens, one table.

    python -m scripts.benchmark_train --size=1b,3b                   one accelerator; torch if it is installed
    python -m scripts.benchmark_train --size=1b --profile=FOLDER     with a breakdown of our step

Ours is the step of `lvm train`. Each contender runs in its own process, one after the other; a failure is reported in
its row. Exits with 1 if ours has no figure.
"""

import dataclasses
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from lvm.common import cli, errors
from lvm.common.errors import UserError
from lvm.hardware import accelerators
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.model import nnx_utils
from lvm.model.flops import CONVENTIONS, train_flops_per_token
from lvm.model.transformer import REMAT_POLICIES, SIZES, ModelConfig, Transformer
from lvm.training import optimizer
from lvm.training.next_token import NextTokenTask
from lvm.training.step import Step
from scripts.contenders import Report, contend, cpu_name, one_line, run_job
from scripts.step_profile import profile

CODES, VOCABULARY = 8192, 8448
_SCHEDULE_STEPS = 10_000  # the benchmark runs the first few
_MEMORY_SHARE = "0.92"  # of a GPU, for JAX: above its default, since no other process uses the GPU
_GIB = 2**30


def _run(args: cli.Args) -> None:
    if args.job:
        run_job(json.loads(args.job), run_ours, "scripts.peer_torch")
        return
    _check_flags(args)
    ends, load = time.monotonic() + 60 * args.minutes, os.getloadavg()
    contenders = [(size, name) for size in args.size for name in ("ours", args.peer) if name != "none"]
    records: list[dict[str, Any]] = []
    for number, (size, name) in enumerate(contenders):
        print(f"\n== {size}, {name}")
        machine = next((r for r in records if r["size"] == size and "batch_size" in r), None)
        if name == "torch" and machine is None:
            records.append({"size": size, "contender": name, "failed": "not run: ours didn't start"})
            continue
        limit = max(0.1, (ends - time.monotonic()) / (len(contenders) - number))
        records += _contend(args, size, name, limit, machine or {})
    print("\n" + "\n".join(_machine_lines(args, records, load)))
    print("\n" + table(records))
    for size in args.size:
        print(_verdict([r for r in records if r["size"] == size], size))
    done = {r["size"] for r in records if r["contender"] == "ours" and "tokens_per_second" in r}
    if done != set(args.size):
        sys.exit(errors.EXIT_ERROR)


def _check_flags(args: cli.Args) -> None:
    for name, values, choices in (("size", args.size, SIZES), ("remat", args.remat, REMAT_POLICIES)):
        for value in values:
            if value not in choices:
                raise UserError(f"--{name}: {value!r} is not one of {', '.join(choices)}")


def _contend(args: cli.Args, size: str, name: str, limit: float, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a contender in its own process; returns its records, with one more for a failure."""
    job = {
        "contender": name,
        "size": size,
        "context": args.context,
        "batch_size": machine.get("batch_size") or args.batch_size,
        "steps": args.steps,
        "warmup": args.warmup,
        "dtype": machine.get("dtype") or args.dtype,
        "platform": machine.get("platform", ""),
        "remat": args.remat,
        "compile": args.torch_compile,
        "profile": args.profile,
    }
    # Setting the old and the new name at once is an error.
    is_set = {"XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"} & os.environ.keys()
    environment = {} if is_set else {"XLA_CLIENT_MEM_FRACTION": _MEMORY_SHARE}
    records = contend("scripts.benchmark_train", job, limit, environment)
    return [{"size": size, "contender": name, **record} for record in records]


def random_tokens(step: int, batch_size: int, context: int) -> np.ndarray:
    """Tokens of a step, equal for all contenders: int32 [B, C+1]."""
    rng = np.random.default_rng(step)
    return rng.integers(0, CODES, (batch_size, context + 1), dtype=np.int32)


def run_ours(job: dict[str, Any], report: Report) -> None:
    """Reports our step with each remat policy, and a profile of the fastest if asked for."""
    device = jax.devices()[0]
    dtype = job["dtype"]
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    config = dataclasses.replace(SIZES[job["size"]], vocabulary_size=VOCABULARY, context=job["context"], dtype=dtype)
    memory = accelerators.memory_bytes(device)
    job = job | {"batch_size": job["batch_size"] or rows_that_fit(config, memory)}
    report(
        {
            "platform": device.platform,
            "device": device.device_kind,
            "dtype": dtype,
            "batch_size": job["batch_size"],
            "libraries": _libraries(),
        }
    )
    fastest: tuple[float, Step] | None = None
    for remat in job["remat"]:
        variant = f"remat {remat}"
        try:
            start = time.perf_counter()
            step = make_step(dataclasses.replace(config, remat=remat), job["batch_size"])
            memory_needed = step.memory_bytes()  # compiles
            print(f"{variant}: compiled in {time.perf_counter() - start:.0f} s, {memory_needed / _GIB:.1f} GiB")
            if memory and memory_needed > memory:
                raise MemoryError(f"needs {memory_needed / _GIB:.1f} of {memory / _GIB:.1f} GiB")
            variant += f", {step.task.kernel} attention"  # type: ignore[attr-defined]
            # The stepper is not kept: its state must be freed before the next one is allocated.
            measured = measure(variant, job, _stepper(step, job), memory_needed)
        except Exception as error:  # the next one may succeed
            print(f"{variant}: {one_line(str(error))}")
            report({"variant": variant, "failed": one_line(str(error))})
            continue
        report(measured)
        if fastest is None or measured["tokens_per_second"] > fastest[0]:
            fastest = measured["tokens_per_second"], step
    if fastest and job["profile"]:
        folder = pathlib.Path(job["profile"], job["size"])
        print(f"profiling into {folder}")
        report({"profile": profile(fastest[1], _batch(0, job), folder)})


def _libraries() -> str:
    names = ["jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin"]
    names += ["nvidia-cudnn-cu12", "nvidia-cudnn-cu13"]
    names += ["libtpu"] if jax.default_backend() == "tpu" else []
    installed = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


def rows_that_fit(config: ModelConfig, memory: int | None) -> int:
    """Estimates the rows per batch from weights, moments, gradients and the activations kept per token."""
    if memory is None:
        return 1
    _, shapes = nnx_utils.abstract_module(lambda rngs: Transformer(config, rngs))
    weights = 18 * nnx_utils.count_params(shapes)
    row = config.context * 34 * config.hidden_size * config.num_layers
    return next((rows for rows in (16, 8, 4, 2) if weights + rows * row < 0.85 * memory), 1)


def make_step(config: ModelConfig, batch_size: int) -> Step:
    """Makes the training step of `lvm train` on one device."""
    B, C = batch_size, config.context
    spec = {
        "tokens": jax.ShapeDtypeStruct((B, C + 1), np.int32),
        "loss_mask": jax.ShapeDtypeStruct((B, C), np.bool_),
        "positions": jax.ShapeDtypeStruct((B, C), np.int32),
        "component_ids": jax.ShapeDtypeStruct((B, C), np.int16),
    }
    tx, schedule = optimizer.build(optimizer.OptimizerConfig(), _SCHEDULE_STEPS)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Step(NextTokenTask(config, spec, ["random"], tx, schedule, mesh), mesh, seed=0)


def _stepper(step: Step, job: dict[str, Any]) -> Callable[[int], tuple[float, float]]:
    """Returns a function step → (seconds, loss) that starts from a fresh state."""
    state = step.init()
    jax.block_until_ready(state)

    def run(step_index: int) -> tuple[float, float]:
        nonlocal state
        batch = step.shard_batch(_batch(step_index, job))
        jax.block_until_ready(batch)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start, float(metrics["loss"])

    return run


def _batch(step: int, job: dict[str, Any]) -> dict[str, np.ndarray]:
    B, C = job["batch_size"], job["context"]
    return {
        "tokens": random_tokens(step, B, C),
        "loss_mask": np.ones((B, C), np.bool_),
        "positions": np.tile(np.arange(C, dtype=np.int32), (B, 1)),
        "component_ids": np.zeros((B, C), np.int16),
    }


def measure(
    variant: str, job: dict[str, Any], run: Callable[[int], tuple[float, float]], memory: int | None = None
) -> dict[str, Any]:
    """Measures a contender: the median of the steps after warm-up, as a row of the table."""
    warmup = [run(step) for step in range(job["warmup"])]
    timed = [run(job["warmup"] + step) for step in range(job["steps"])]
    seconds, losses = [s for s, _ in timed], [loss for _, loss in warmup + timed]
    if not all(math.isfinite(loss) for loss in losses):
        raise FloatingPointError(f"losses {losses}")
    median = statistics.median(seconds)
    rate = job["batch_size"] * job["context"] / median
    print(
        f"{variant}: {1000 * median:.1f} ms a step ({1000 * min(seconds):.1f} to {1000 * max(seconds):.1f}), "
        f"{rate:,.0f} tokens/s, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return {
        "variant": variant,
        "batch": f"{job['batch_size']} × {job['context']}",
        "milliseconds": 1000 * median,
        "tokens_per_second": rate,
        "losses": [losses[0], losses[-1]],
        "memory": memory,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Formats the rows of all contenders, followed by the profiles."""
    titles = [
        "size",
        "contender",
        "rows × context",
        "ms a step",
        "tokens/s",
        *(f"MFU {c}" for c in CONVENTIONS),
    ]
    titles += ["GiB", "loss, first to last"]
    lines, profiles = [titles], []
    for record in records:
        name = f"{record['contender']}, {record['variant']}" if record.get("variant") else record["contender"]
        start = [record["size"], name]
        if "failed" in record:
            lines.append([*start, record["failed"]])
        elif "tokens_per_second" in record:
            first, last = record["losses"]
            row = [record["batch"], f"{record['milliseconds']:.1f}", f"{record['tokens_per_second']:,.0f}"]
            row += [f"{share:.1%}" if share else "-" for share in _mfu(record, records)]
            memory = f"{record['memory'] / _GIB:.1f}" if record["memory"] else "-"
            lines.append([*start, *row, memory, f"{first:.3f} to {last:.3f}"])
        elif "profile" in record:
            profiles += ["", f"{record['size']}, our step by kind of work:", *record["profile"]]
    whole = [line for line in lines if len(line) == len(titles)]
    widths = [max(len(line[i]) for line in (lines if i < 2 else whole)) for i in range(len(titles))]
    rows = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines]
    return "\n".join(rows + profiles)


def _mfu(record: dict[str, Any], records: list[dict[str, Any]]) -> list[float | None]:
    """MFU by each convention; None where the peak is unknown: the datasheet's peaks are for bfloat16."""
    machine = _machine(records, record["size"])
    chip = _chip(machine)
    if chip is None or machine["dtype"] != "bfloat16":
        return [None for _ in CONVENTIONS]
    config = dataclasses.replace(SIZES[record["size"]], vocabulary_size=VOCABULARY)
    rate, context = record["tokens_per_second"], int(record["batch"].split(" × ")[1])
    return [rate * train_flops_per_token(config, context, name) / chip.peak_flops for name in CONVENTIONS]


def _machine(records: list[dict[str, Any]], size: str) -> dict[str, Any]:
    return next(r for r in records if "device" in r and r["size"] == size and r["contender"] == "ours")


def _chip(machine: dict[str, Any]) -> accelerators.Accelerator | None:
    return accelerators.accelerator_of(SimpleNamespace(device_kind=machine["device"]))


def _machine_lines(args: cli.Args, records: list[dict[str, Any]], load: tuple[float, ...]) -> list[str]:
    starts = [record for record in records if "libraries" in record]
    libraries = dict.fromkeys(r["libraries"] for r in starts)
    lines = [", ".join([f"Python {platform.python_version()}", *libraries])]
    machine = next((r for r in starts if r["contender"] == "ours"), None)
    if machine is None:
        return lines
    chip = _chip(machine)
    if machine["platform"] == "cpu":
        before = ", ".join(f"{x:.1f}" for x in load)
        lines.append(f"{cpu_name()}, {os.cpu_count()} cores, load before the run {before} (1, 5, 15 minutes)")
    else:
        lines.append(machine["device"])
    if chip and machine["dtype"] == "bfloat16":
        lines.append(f"MFU relative to {chip.peak_flops / accelerators.TERA:g} TFLOP/s, {chip.name} in bfloat16")
    else:
        lines.append(f"no MFU: this device has no known peak in {machine['dtype']}")
    lines.append(f"compute in {machine['dtype']}, parameters and AdamW in float32, medians of {args.steps} steps")
    return lines


def _verdict(records: list[dict[str, Any]], size: str) -> str:
    best = {}
    for record in sorted((r for r in records if "milliseconds" in r), key=lambda r: -r["milliseconds"]):
        best[record["contender"]] = record
    if len(best) < 2:
        return f"{size}: nothing to compare" if not best else f"{size}: best is {next(iter(best.values()))['variant']}"
    ours, torch = best["ours"], best["torch"]
    ratio = ours["tokens_per_second"] / torch["tokens_per_second"]
    return f"{size}: ours ({ours['variant']}) at {ratio:.2f} × torch ({torch['variant']})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.comma_list("size", ["1b"], f"model sizes, of {', '.join(SIZES)}")
    flags.integer("context", 4096, "tokens per row", lower_bound=2)
    flags.integer("batch_size", 0, "rows; 0: estimated from the memory", lower_bound=0)
    flags.integer("steps", 8, "timed steps", lower_bound=1)
    flags.integer("warmup", 3, "steps before them", lower_bound=1)
    flags.comma_list("remat", ["dots", "none"], f"remat policies to try, of {', '.join(REMAT_POLICIES)}")
    flags.enum("peer", "torch", ["torch", "none"], "peer to compare with")
    flags.enum(
        "dtype",
        "auto",
        ["auto", "bfloat16", "float32"],
        "compute dtype; auto: float32 on a CPU, else bfloat16",
    )
    flags.boolean("torch_compile", True, "use torch.compile")
    flags.string("profile", "", "folder for a trace of our step; prints its breakdown")
    flags.float("minutes", 7.5, "time limit of all contenders, shared evenly")
    flags.string("job", "", "internal: the work of one contender, as JSON")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
