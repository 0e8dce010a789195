"""Seed derivation: independent streams of random numbers from one configured seed."""

import numpy as np


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed from non-negative integers, by `numpy.random.SeedSequence`; equal input gives an equal seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
