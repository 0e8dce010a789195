"""Accelerator specifications, XLA compiler options and the device mesh."""
