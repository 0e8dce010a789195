"""What every test runs with: eight CPU devices, so that meshes are real, and properties tried on few examples."""

import jax
from hypothesis import settings

# By jax's own setting, not by XLA_FLAGS: commands that a test starts keep the devices of the machine.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")
