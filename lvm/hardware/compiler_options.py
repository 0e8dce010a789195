"""Options of the compiler: what a platform's programs are compiled with and why, and what a run says otherwise.

They are passed to the compiler with each program (`compiler_options`), not through XLA_FLAGS: so they are part of a
run's record, and a plan compiles with the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from lvm.common.errors import UserError

OptionValue = bool | int | float | str

# platform → option → (value, reason)
DEFAULT_OPTIONS: dict[str, dict[str, tuple[OptionValue, str]]] = {
    "tpu": {
        "xla_tpu_enable_latency_hiding_scheduler": (
            True,
            "starts what travels between chips early and waits for it late",
        ),
        "xla_tpu_enable_async_collective_fusion": (True, "matrix products and collectives run in one kernel"),
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": (
            True,
            "the next weights arrive while these are multiplied",
        ),
        "xla_tpu_enable_async_collective_fusion_multiple_steps": (
            True,
            "one gather may stretch over several products: a layer's attention is shorter than its MLP's weights",
        ),
        "xla_tpu_overlap_compute_collective_tc": (True, "lets the core multiply while it sends"),
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": (
            True,
            "starts what travels between GPUs early and waits for it late; not on by default everywhere",
        ),
    },
    "cpu": {},
}

# What `deterministic` adds: without it two runs of one program may differ in their last bits.
DETERMINISTIC_OPTIONS: dict[str, dict[str, tuple[OptionValue, str]]] = {
    "tpu": {},  # its programs give the same bits every time
    "gpu": {
        "xla_gpu_deterministic_ops": (
            True,
            "sums in a fixed order: scatters without atomics, cuDNN's fixed algorithms",
        ),
        "xla_gpu_exclude_nondeterministic_ops": (
            True,
            "an operation that has no such kernel is an error, not a risk",
        ),
        "xla_gpu_autotune_level": (
            0,
            "kernels aren't chosen by timing, which may end otherwise at the next start",
        ),
    },
    "cpu": {},
}
DETERMINISM_COST = {
    "tpu": "nothing: programs there are deterministic",
    "gpu": "speed: slower scatters and attention gradients, and matrix products with untuned kernels",
    "cpu": "nothing: programs there are deterministic",
}


def compiler_options(
    platform: str, overrides: str = "", deterministic: bool = False
) -> dict[str, OptionValue]:
    """The options that programs of a platform are compiled with.

    Args:
      platform: "tpu", "gpu" or "cpu".
      overrides: `name=value name=value …`, set over the table or beside it; `name=` leaves the compiler its own
        default. Names that the compiler doesn't know are refused when it compiles.
      deterministic: adds what makes two runs equal to the bit; `DETERMINISM_COST` says what for.

    Raises:
      UserError: an override that isn't `name=value`, or one name twice.
    """
    table = DEFAULT_OPTIONS[platform] | (DETERMINISTIC_OPTIONS[platform] if deterministic else {})
    options = {name: value for name, (value, _) in table.items()}
    for name, value in _parse(overrides).items():
        if value == "":
            options.pop(name, None)
        else:
            options[name] = _typed(value)
    return options


def option_error(error: str, options: Mapping[str, OptionValue]) -> str | None:
    """A compiler's complaint about one of `options` as a line for the user; None if it's about something else."""
    for name, value in options.items():
        if f"No such compile option: '{name}'" in error:
            return f"config.flags: {name}: this version of the compiler has no such option"
        if f"setting option {name}" in error:
            return f"config.flags: {name}={value}: {error.rpartition(name)[2].strip(' ,')}"
    return None


def _parse(overrides: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in overrides.split():
        name, mark, value = part.removeprefix("--").partition("=")
        if not mark or not name:
            raise UserError(f"config.flags: {part!r}; wanted name=value, with spaces between them")
        if name in found:
            raise UserError(f"config.flags: {name} stands there twice")
        found[name] = value
    return found


def _typed(value: str) -> OptionValue:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
