"""Random arrays, and compiled pullbacks, of the quantizers' tests."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def value_and_pullback(function, arguments, cotangents):
    """The value of a function and the gradients of its arguments, compiled as one program."""

    @jax.jit
    def run(arguments, cotangents):
        value, pull_back = jax.vjp(function, *arguments)
        return value, pull_back(cotangents)

    return run(arguments, cotangents)
