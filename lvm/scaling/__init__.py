"""Scaling laws: plans of sweeps, their runs and results."""
