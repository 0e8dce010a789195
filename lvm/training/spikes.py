"""Loss-spike recovery: roll back to an earlier checkpoint and skip the offending batches.

As in PaLM (arXiv 2204.02311, section 5.1). The skipped batches are recorded in the workdir, so that the order of data
stays a function of configuration, seed, step and that record.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative

FILENAME = "left-out.json"


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """Detection of loss spikes, and recovery from them.

    Attributes:
      deviations: threshold, in standard deviations above the mean of the previous losses; 0 turns detection off.
      window: how many previous losses; with fewer there is no spike.
      skip_before: batches skipped before the spike's own, which is skipped too.
      max_rewinds: rewind limit; the next spike ends the run.
    """

    deviations: float = 0.0
    window: int = 128
    skip_before: int = 100
    max_rewinds: int = 10

    def __post_init__(self) -> None:
        check_non_negative(self, "deviations", "skip_before", "max_rewinds")
        if self.window < 2:
            raise UserError(f"window={self.window} must be at least 2, for a standard deviation")


class SpikeError(Exception):
    """The loss of a step is a spike.

    Attributes:
      step: the step whose update had it; the first is 1.
    """

    def __init__(self, step: int, loss: float, mean: float):
        super().__init__(f"step {step}: the loss of {loss:.4f} is a spike (mean: {mean:.4f})")
        self.step = step


class SpikeDetector:
    """Compares each loss with those of the previous steps.

    Args:
      config: the threshold and the window.
      losses: of the previous steps, from a checkpoint's meta, so that a resumed run detects the same spikes.
    """

    def __init__(self, config: SpikeConfig, losses: Sequence[float] = ()):
        self._config = config
        self.losses: deque[float] = deque(losses, maxlen=config.window)

    def update(self, step: int, loss: float) -> None:
        """Adds the loss of a step that was not skipped.

        Raises:
          SpikeError: it is a spike.
        """
        if not self._config.deviations:
            return
        if len(self.losses) == self._config.window:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + self._config.deviations * deviation:
                raise SpikeError(step, loss, mean)
        self.losses.append(loss)


class SkippedBatches:
    """The batches that a run skips.

    Attributes:
      rewinds: how often the run has rolled back.
      ranges: (first, last) batch of each range, ascending and disjoint.
    """

    def __init__(self, rewinds: int = 0, ranges: Sequence[tuple[int, int]] = ()):
        self.rewinds = rewinds
        self.ranges = [(int(first), int(last)) for first, last in ranges]

    @classmethod
    def load(cls, workdir: epath.PathLike) -> SkippedBatches:
        """Reads a workdir's record; without one nothing is skipped.

        Raises:
          UserError: the file isn't what `save` wrote.
        """
        path = epath.Path(workdir) / FILENAME
        if not path.exists():
            return cls()
        record = files.read_json(path)
        try:
            return cls(record["rewinds"], record["batches"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a record of skipped batches: {error!r}") from error

    def save(self, workdir: epath.PathLike) -> None:
        """Writes the workdir's record."""
        files.write_json(epath.Path(workdir) / FILENAME, {"rewinds": self.rewinds, "batches": self.ranges})

    def batch_index(self, step: int) -> int:
        """Returns the batch after `step` updates: the `step`-th, from 0, of those not skipped."""
        index = step
        for first, last in self.ranges:
            if index >= first:
                index += last - first + 1
        return index

    def add(self, first: int, last: int) -> None:
        """Skips the batches [first, last] too, and counts a rewind."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.ranges, (first, last)]):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], high)
            else:
                merged.append((low, high))
        self.ranges = merged
        self.rewinds += 1
