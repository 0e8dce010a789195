"""Scenes from LVM's JSONL: codes that are ready, a line a scene."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneCodes, SceneInfo
from lvm.data.images.sources.listing import check_index, find_files, hash_files, read_range
from lvm.data.mixture import split
from lvm.data.store import jsonl
from lvm.data.streams.codecs import Codec, Image


@dataclasses.dataclass(frozen=True)
class JsonlConfig(jsonl.JsonlFormat):
    """The parameters of JSONL files: `path`, a file, a folder of them or a pattern, and those of `JsonlFormat`."""

    kind: ClassVar[str] = "jsonl"
    path: str = ""


class JsonlSource:
    """A `CodeSource` of JSONL files: each line is a scene of one stream, rgb, whose frames are its grids.

    Line 12 of a.jsonl is the scene "a.jsonl/12", counted from 1. A line's group is its content, so that what is there
    twice is on one side of the split. Lines that are none are listed.

    Args:
      preprocess: not used: there is nothing to decode.
      **parameters: the fields of `JsonlConfig`.

    Raises:
      UserError: there is no such file, or no line in them is a sentence of the format.
    """

    classes: tuple[str, ...] = ()
    stream_sets: tuple[tuple[str, ...], ...] = (("rgb",),)

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: JsonlConfig = from_config_dict(JsonlConfig, parameters, "jsonl")
        self.num_codes, self.grid = self.config.num_codes, self.config.grid
        self.streams: Mapping[str, Codec] = {"rgb": Image()}
        skipped: list[Failure] = []
        self._root, self._files = find_files(self.config.path, (jsonl.SUFFIX,), skipped)
        self._lines: list[tuple[SceneInfo, str, int, int]] = []  # info, file, offset, size
        for file in self._files:
            try:
                self._list(file, skipped)
            except OSError as error:
                skipped.append(Failure(file, f"can't be read: {error.strerror}"))
        if not self._lines:
            first = f"; {skipped[0].key}: {skipped[0].reason}" if skipped else ""
            raise UserError(f"{self.config.path}: no line of its files is a sentence of codes{first}")
        self.name = self._root.resolve().name
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._lines)

    def info(self, index: int) -> SceneInfo:
        """See `CodeSource.info`."""
        check_index(index, len(self))
        return self._lines[index][0]

    def load_codes(self, index: int) -> SceneCodes:
        """See `CodeSource.load_codes`."""
        info = self.info(index)
        _, file, offset, size = self._lines[index]
        try:
            line = read_range(pathlib.Path(self._root / file), offset, size)
            grids = jsonl.decode_grids(line, self.config)  # [T, N]
        except (OSError, ValueError) as error:  # the file was changed since it was listed
            empty = np.empty((0, 1, self.grid[0] * self.grid[1]), np.uint16)
            return SceneCodes(
                dataclasses.replace(info, num_frames=0), empty, (Failure(info.key, str(error)),)
            )
        return SceneCodes(info, grids[:, None].astype(np.uint16))  # [T, 1, N]

    def describe(self) -> dict[str, Any]:
        """See `CodeSource.describe`."""
        return {
            "kind": self.config.kind,
            "num_codes": self.num_codes,
            "grid": list(self.grid),
            "num_scenes": len(self),
            "listing": hash_files(self._root, self._files),
        }

    def _list(self, file: str, skipped: list[Failure]) -> None:
        offset = 0
        with open(self._root / file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                key = f"{file}/{number}"
                if line.strip():
                    try:
                        grids = jsonl.decode_grids(line, self.config)
                        group = f"{split.content_hash(grids.tobytes()):016x}"
                        info = SceneInfo(key, group, "", len(grids), ("rgb",))
                        self._lines.append((info, file, offset, len(line)))
                    except ValueError as error:
                        skipped.append(Failure(key, str(error)))
                offset += len(line)
