"""Going back before a spike of the loss, and around the batches that it came with.

After the practice of PaLM (arXiv 2204.02311, section 5.1): the run returns to a checkpoint from before the spike and
leaves out the batches around it. Which batches a run has left out is in its workdir, so that the order of data
stays a function of configuration, seed, step and that list.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError

FILENAME = "left-out.json"


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """When a loss is a spike, and what is done about it.

    Attributes:
      deviations: how many standard deviations above the mean of the steps before; 0 looks for none.
      window: how many steps before; as long as there are fewer, nothing is a spike.
      skip_before: batches that are left out before the spike's own, which is left out too.
      max_rewinds: spikes that are gone around; the next one ends the run.
    """

    deviations: float = 0.0
    window: int = 128
    skip_before: int = 100
    max_rewinds: int = 10

    def __post_init__(self) -> None:
        if self.deviations < 0:
            raise UserError(f"deviations: {self.deviations} is negative; 0 looks for no spikes")
        if self.window < 2:
            raise UserError(f"window: {self.window} steps have no deviation; wanted 2 or more")
        for name in ("skip_before", "max_rewinds"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)} is negative")


class SpikeError(Exception):
    """The loss of a step is a spike.

    Attributes:
      step: whose update had it (the first is 1).
      loss: that loss.
      mean: the mean of the steps before.
    """

    def __init__(self, step: int, loss: float, mean: float):
        super().__init__(f"step {step}: the loss of {loss:.4f} is a spike (mean: {mean:.4f})")
        self.step, self.loss, self.mean = step, loss, mean


class SpikeDetector:
    """Remembers the losses of the last steps and knows a spike among them.

    Args:
      config: see `SpikeConfig`.
      losses: those of the steps before, as `recent` gave them.
    """

    def __init__(self, config: SpikeConfig, losses: Sequence[float] = ()):
        self._config = config
        self._losses: deque[float] = deque(losses, maxlen=config.window)

    @property
    def recent_losses(self) -> list[float]:
        """What a checkpoint keeps, so that a resumed run sees the spikes that an unbroken one does."""
        return list(self._losses)

    def update(self, step: int, loss: float) -> None:
        """Takes the loss of another step, one that was not skipped.

        Raises:
          SpikeError: it is a spike.
        """
        if not self._config.deviations:
            return
        if len(self._losses) == self._config.window:
            mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
            if loss > mean + self._config.deviations * deviation:
                raise SpikeError(step, loss, mean)
        self._losses.append(loss)


class SkippedBatches:
    """The batches that a run leaves out: ranges of batch numbers, in order and apart.

    Attributes:
      rewinds: how many spikes the run has gone around.
      ranges: pairs of the first and the last batch of each.
    """

    def __init__(self, rewinds: int = 0, ranges: Sequence[tuple[int, int]] = ()):
        self.rewinds = rewinds
        self.ranges = [(int(first), int(last)) for first, last in ranges]

    @classmethod
    def load(cls, workdir: epath.PathLike) -> SkippedBatches:
        """As a workdir has it.

        Raises:
          UserError: the file isn't what `save` wrote.
        """
        path = epath.Path(workdir) / FILENAME
        if not path.exists():
            return cls()
        found = files.read_json(path)
        try:
            return cls(found["rewinds"], [(first, last) for first, last in found["batches"]])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a list of batches that were left out: {error!r}") from error

    def save(self, workdir: epath.PathLike) -> None:
        """Into a workdir, whole or not at all."""
        batches = [list(span) for span in self.ranges]
        files.write_json(epath.Path(workdir) / FILENAME, {"rewinds": self.rewinds, "batches": batches})

    def batch_index(self, step: int) -> int:
        """The number of the batch after `step` updates: the `step`-th, from 0, of those that aren't left out."""
        number = step
        for first, last in self.ranges:
            if number < first:
                break
            number += last - first + 1
        return number

    def add(self, first: int, last: int) -> None:
        """Leaves out the batches [first, last] too, where they aren't yet: one more rewind."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.ranges, (first, last)]):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], high)
            else:
                merged.append((low, high))
        self.ranges = merged
        self.rewinds += 1
