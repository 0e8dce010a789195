"""JAX's settings in a command: variables of another project must not change what a run computes."""

import jax

from lvm.common.logging import log_warning

# Settings that change numbers, random or not, or forbid sound programs. A skipped step, and the loss of a component
# that a batch lacks, are NaN by design.
_PINNED = {
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_debug_nans": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_enable_x64": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_legacy_prng_key": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": None,
}


def pin_settings() -> None:
    """Sets JAX's settings that change what a command computes to their defaults, and logs each that differed."""
    for name, default in _PINNED.items():
        value = jax.config.values[name]
        if value != default:
            jax.config.update(name, default)
            log_warning(f"{name.upper()}={getattr(value, 'value', value)} is ignored: it would change or end a run")


def device_problem() -> str:
    """One line why JAX has no devices, "" if it has; starts its backend."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former, without a message, for CUDA without a GPU or plugin
        reason = " ".join(str(error).split())[:300] or "no such device, or its plugin is not installed"
        return f"JAX_PLATFORMS={jax.config.values['jax_platforms'] or ''}: {reason}"
    return ""
