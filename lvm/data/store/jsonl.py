"""LVM's JSONL: a sentence a line, {"tokens": base64 of int32 little-endian}, a grid after the other, no BOS, no EOS.

A file is read as a store: each line is a scene of one stream, `rgb`, whose frames are the line's grids, so
`Video(frames=16, strides=(1,))` gives back lines of 16 grids as they are. The first time, the file is read
through and an index is left beside it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture import split

SUFFIX = ".jsonl"
# Fields as in `scenes.INDEX`, and where the line is.
_INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("frames", "<u2"),
        ("stream_set", "u1"),
        ("class_id", "<i4"),
        ("group", "<u8"),
    ]
)


@dataclasses.dataclass(frozen=True)
class JsonlFormat:
    """What a JSONL file doesn't tell; the defaults are those of LVM's published tokenizer.

    Attributes:
      num_codes: size of the codebook.
      grid: rows and columns of an image's codes.
    """

    num_codes: int = 8192
    grid: tuple[int, ...] = (16, 16)

    def __post_init__(self) -> None:
        if not 0 < self.num_codes <= 2**16:
            raise UserError(f"num_codes: {self.num_codes} is not in 1..{2**16}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise UserError(f"grid: {self.grid} is not two positive numbers, rows and columns")


def encode_line(codes: np.ndarray) -> str:
    """A sentence's codes int [grids, N] as a line, with its end."""
    return json.dumps({"tokens": base64.b64encode(codes.astype("<i4").tobytes()).decode()}) + "\n"


def decode_line(line: bytes) -> np.ndarray:
    """The tokens of a line, int32 [n]. Raises ValueError for what is none."""
    try:
        return np.frombuffer(base64.b64decode(json.loads(line)["tokens"], validate=True), "<i4")
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def decode_grids(line: bytes, format: JsonlFormat) -> np.ndarray:
    """The codes of a line, int32 [grids, N]. Raises ValueError for what is no sentence of the format."""
    try:
        tokens = decode_line(line)
    except ValueError as error:
        raise ValueError(f"not {{'tokens': base64}}: {error}") from error
    codes_per_image = format.grid[0] * format.grid[1]
    if not len(tokens) or len(tokens) % codes_per_image:
        raise ValueError(
            f"{len(tokens)} tokens are no whole number of images of {codes_per_image} codes (grid)"
        )
    if tokens.min() < 0 or tokens.max() >= format.num_codes:
        raise ValueError(
            f"codes lie in [{tokens.min()}, {tokens.max()}], expected [0, {format.num_codes}) (num_codes)"
        )
    return tokens.reshape(-1, codes_per_image)


class JsonlStore:
    """A JSONL file with the attributes and methods of `lvm.data.store.reader.Store` that a mixture reads by.

    A line's group is its content: a sentence that is there twice is on one side of the split, and a repetition.

    Raises:
      UserError: a line that isn't a sentence of this format; names file and line.
    """

    classes: tuple[str, ...] = ()
    stream_sets = (("rgb",),)

    def __init__(self, path: epath.PathLike, format: JsonlFormat):
        self.path, self._format = epath.Path(path), format
        self.num_codes = format.num_codes
        self.codes_per_image = format.grid[0] * format.grid[1]
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        # A path's own times and sizes tell whether the index is that of the file as it is now.
        stamp = {"bytes": status.st_size, "modified": status.st_mtime_ns, **dataclasses.asdict(format)}
        self._index = self._open_index(files.as_json(stamp))
        self.indexes = [self._index]
        groups = self._index["group"]
        self._extremes = (int(groups.min()), int(groups.max())) if len(groups) else (0, 0)
        self.manifest: dict[str, Any] = {
            "tokenizer": {
                "weights": "",
                "hash": "",
                "grid": list(format.grid),
                "num_codes": format.num_codes,
            },
            "source": {"jsonl": self.path.name},
        }

    def __reduce__(self) -> tuple[type[JsonlStore], tuple[str, JsonlFormat]]:
        return JsonlStore, (os.fspath(self.path), self._format)

    def __len__(self) -> int:
        return len(self._index)

    def identity(self) -> str:
        """A hash of every line's content, in order."""
        return f"{split.content_hash(np.ascontiguousarray(self._index['group']).tobytes()):016x}"

    def entries(self, numbers: np.ndarray) -> np.ndarray:
        """The index's entries of the lines at `numbers`, int64 [n]."""
        return self._index[numbers]

    def heldout(self, fraction: float, entries: np.ndarray | None = None) -> np.ndarray:
        """bool [n]: which of the lines of `entries` (of all) are held out, by `lvm.data.mixture.split`."""
        groups = (self._index if entries is None else entries)["group"]
        return split.heldout_mask(groups, fraction, self._extremes)

    def grids(self, entries: np.ndarray, frames: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """As `Store.grids`: uint16 [n, N]; `columns` are all 0."""
        codes = np.empty((len(entries), self.codes_per_image), np.uint16)
        starts, at, which = np.unique(entries["offset"], return_index=True, return_inverse=True)
        for place, (start, size) in enumerate(
            zip(starts.tolist(), entries["size"][at].tolist(), strict=True)
        ):
            mine = which == place
            codes[mine] = self._grids(self._content[start : start + size], start)[frames[mine]]
        return codes

    def _grids(self, content: bytes, start: int, line: int | None = None) -> np.ndarray:
        """A line's grids; `line` counts the sentences before it, looked up by its place in the file if not given."""
        try:
            return decode_grids(content, self._format)
        except ValueError as error:
            if line is None:
                line = int(np.searchsorted(self._index["offset"], start))
            raise UserError(
                f"{self.path}, sentence {line + 1}: {error}; config.data.jsonl tells the format"
            ) from error

    def _open_index(self, stamp: dict[str, Any]) -> np.ndarray:
        index_path = self.path.parent / f"{self.path.name}.index"
        stamp_path = self.path.parent / f"{self.path.name}.index.json"
        if stamp_path.exists() and index_path.exists():
            found = files.read_json(stamp_path)
            if found == {**stamp, "sentences": found.get("sentences")} and (
                index_path.stat().length == found["sentences"] * _INDEX.itemsize
            ):
                return np.memmap(index_path, _INDEX, mode="r") if found["sentences"] else np.zeros(0, _INDEX)
        log_info(f"{self.path}: reading through it once, for an index")
        index = np.array(list(self._scan()), _INDEX)
        try:
            files.write_atomically(index_path, index.tobytes())
            files.write_json(stamp_path, {**stamp, "sentences": len(index)})
        except OSError as error:
            log_info(
                f"{index_path}: can't be written ({error.strerror}); every process will read the file through"
            )
        return index

    def _scan(self) -> Iterator[tuple[int, ...]]:
        start, line = 0, 0
        while start < len(self._content):
            end = self._content.find(b"\n", start)
            end = len(self._content) if end < 0 else end
            content = self._content[start:end]
            if content.strip():
                grids = self._grids(content, start, line)
                yield start, end - start, len(grids), 0, -1, split.content_hash(grids.tobytes())
                line += 1
            start = end + 1
