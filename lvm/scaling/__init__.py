"""Scaling laws: plans of sweeps, their runs and results, fits with intervals and their page."""
