"""The most memory that this process has held."""

from pathlib import Path


def peak_mib() -> float:
    """Returns the largest resident size since this program began, in MiB (Linux alone).

    `getrusage` counts the parent's size too: a program started by a large process begins with that process's peak.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
