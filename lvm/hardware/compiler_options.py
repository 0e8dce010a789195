"""XLA compiler options per platform, with the reason for each.

They are passed with each program (`compiler_options=`), not through XLA_FLAGS: so they are recorded with a run, and
`lvm plan` compiles with the same options.
"""

import contextlib
from collections.abc import Mapping

from lvm.common.errors import UserError

OptionValue = bool | int | float | str

# platform → option → (value, reason)
DEFAULT_OPTIONS: dict[str, dict[str, tuple[OptionValue, str]]] = {
    "tpu": {
        "xla_tpu_enable_latency_hiding_scheduler": (True, "starts collectives early and waits for them late"),
        "xla_tpu_enable_async_collective_fusion": (True, "overlaps matrix products and collectives in one kernel"),
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": (
            True, "the next layer's weights arrive during this layer's products",
        ),
        "xla_tpu_enable_async_collective_fusion_multiple_steps": (
            True, "one gather may span several products: a layer's attention is shorter than its MLP's weights",
        ),
        "xla_tpu_overlap_compute_collective_tc": (True, "computes on the core while it sends"),
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": (
            True, "starts collectives early and waits for them late; not the default everywhere",
        ),
    },
    "cpu": {},
}  # fmt: skip

# Added by `deterministic`: without them two runs of one program may differ in their last bits.
DETERMINISTIC_OPTIONS: dict[str, dict[str, tuple[OptionValue, str]]] = {
    "tpu": {},
    "gpu": {
        "xla_gpu_deterministic_ops": (True, "reduces in a fixed order: no atomics, fixed cuDNN algorithms"),
        "xla_gpu_exclude_nondeterministic_ops": (True, "fails if an operation has no deterministic kernel"),
        "xla_gpu_autotune_level": (0, "does not pick kernels by timing, which varies between starts"),
    },
    "cpu": {},
}
DETERMINISM_COST = {
    "tpu": "nothing: programs there are deterministic",
    "gpu": "speed: slower scatters and attention gradients, and matrix products with untuned kernels",
    "cpu": "nothing: programs there are deterministic",
}


def compiler_options(platform: str, overrides: str = "", deterministic: bool = False) -> dict[str, OptionValue]:
    """Compiler options for the programs of a platform.

    Args:
      overrides: `name=value name=value …`, added to the table or replacing its values; `name=` restores the
        compiler's default. The compiler itself rejects unknown names.
      deterministic: adds the options that make runs reproducible to the bit, at `DETERMINISM_COST`.

    Raises:
      UserError: an override that is not `name=value`, or a duplicate name.
    """
    table = DEFAULT_OPTIONS[platform] | (DETERMINISTIC_OPTIONS[platform] if deterministic else {})
    options = {name: value for name, (value, _) in table.items()}
    names = set()
    for override in overrides.split():
        name, separator, value = override.removeprefix("--").partition("=")
        if not separator or not name:
            raise UserError(f"config.compiler_options: {override!r} must be name=value; separate options by spaces")
        if name in names:
            raise UserError(f"config.compiler_options: {name} is set twice")
        names.add(name)
        if value:
            options[name] = _parse(value)
        else:
            options.pop(name, None)
    return options


def option_error(error: str, options: Mapping[str, OptionValue]) -> str | None:
    """The message for the user if a compiler's error is about one of `options`, else None."""
    for name, value in options.items():
        if f"No such compile option: '{name}'" in error:
            return f"config.compiler_options: {name}: this version of the compiler has no such option"
        if f"setting option {name}" in error:
            return f"config.compiler_options: {name}={value}: {error.rpartition(name)[2].strip(' ,')}"
    return None


def _parse(value: str) -> OptionValue:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value
