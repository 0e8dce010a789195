"""JAX's settings that a command pins."""

import jax
import pytest

from lvm.common.jax_settings import pin_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_debug_nans", True),
        ("jax_default_matmul_precision", "bfloat16"),
        ("jax_random_seed_offset", 3),
        ("jax_threefry_partitionable", False),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_transfer_guard", "disallow"),
    ],
)
def test_pin_settings_resets_and_names_a_variable(name, value, caplog):
    pin_settings()
    caplog.clear()
    default = jax.config.values[name]
    jax.config.update(name, value)
    try:
        pin_settings()
        assert jax.config.values[name] == default
    finally:
        jax.config.update(name, default)
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == [f"{name.upper()}={value}"]
