"""Division of a source's scenes among the shards of a store: a function of the source's names and of nothing else."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """Scenes that are listed at once, without a list of them.

    Attributes:
      start, stop: the files [start, stop) of the source, or the scenes if it has no files to divide.
      piece, pieces: of `pieces` equal ranges of the files' scenes, the one that it is.
    """

    start: int
    stop: int
    piece: int = 0
    pieces: int = 1


def split_range(size: int, piece: int, pieces: int) -> tuple[int, int]:
    """Returns the start and stop of one of `pieces` consecutive ranges of [0, size), as equal as possible."""
    return size * piece // pieces, size * (piece + 1) // pieces


def divide_files(num_files: int, shard: int, num_shards: int) -> list[PartSpec]:
    """Returns the parts of a shard: consecutive files, one each, or a piece of one if shards outnumber files."""
    if num_files >= num_shards:
        return [PartSpec(file, file + 1) for file in range(*split_range(num_files, shard, num_shards))]
    file = shard * num_files // num_shards
    first, end = (-(-num_shards * i // num_files) for i in (file, file + 1))
    return [PartSpec(file, file + 1, shard - first, end - first)]
