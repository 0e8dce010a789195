"""Submission of runs to a backend: this machine, TPU VMs, GKE or Slurm."""
