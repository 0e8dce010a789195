"""Code source of LVM's JSONL: one scene per line."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lvm.data.images.sources.base import CodeSource, PathConfig
from lvm.data.images.sources.listing import failure_reason, read_range
from lvm.data.images.sources.scene import Failure, SceneCodes, SceneInfo
from lvm.data.mixture import split
from lvm.data.store import jsonl
from lvm.data.streams.codecs import Image


@dataclasses.dataclass(frozen=True)
class JsonlConfig(jsonl.JsonlFormat, PathConfig):
    """Parameters of a JSONL source: its path, and the format."""


Line = tuple[str, int, int]  # file, offset and size in bytes


class JsonlSource(CodeSource[Line]):
    """A `CodeSource` of JSONL files: each line is a scene of one stream, rgb, with one frame per grid.

    Line 12 of a.jsonl is the scene "a.jsonl/12", counted from 1. Its group is a hash of its content, so that equal
    lines are in the same split. Malformed lines are skipped. `preprocess` is not used.
    """

    kind = "jsonl"
    config_class = JsonlConfig
    scene_noun = "line of codes"
    streams = {"rgb": Image()}  # noqa: RUF012

    def load_codes(self, index: int) -> SceneCodes:
        info, (file, offset, size) = self._scene(index)
        try:
            grids = jsonl.decode_grids(read_range(self._folder.local(file), offset, size), self.config)  # [T, N]
        except (OSError, ValueError) as error:  # the file has changed since it was listed
            info = dataclasses.replace(info, num_frames=0)
            empty = np.empty((0, 1, self.grid[0] * self.grid[1]), np.uint16)
            return SceneCodes(info, empty, (Failure(info.key, failure_reason(self._root, error)),))
        return SceneCodes(info, grids[:, None].astype(np.uint16))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"num_codes": self.num_codes, "grid": list(self.grid)}

    def _reset(self) -> None:
        self.num_codes, self.grid = self.config.num_codes, self.config.grid

    def _list_file(self, file: str) -> Iterator[tuple[SceneInfo, Line]]:
        offset = 0
        with open(self._folder.local(file), "rb") as lines:
            for number, line in enumerate(lines, 1):
                key = f"{file}/{number}"
                if line.strip():
                    try:
                        grids = jsonl.decode_grids(line, self.config)
                        group = f"{split.content_hash(grids.tobytes()):016x}"
                        yield SceneInfo(key, group, "", len(grids), ("rgb",)), (file, offset, len(line))
                    except ValueError as error:
                        self._skip(key, str(error))
                offset += len(line)
