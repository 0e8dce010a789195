"""LVM's JSONL: one sentence per line, {"tokens": base64 of int32 little-endian}, its grids in order, no BOS or EOS.

`JsonlStore` reads a file as a store: each line is a scene of one stream, `rgb`, whose frames are the line's grids, so
`Video(frames=16, strides=(1,))` reproduces lines of 16 grids. The first use writes an index beside the file.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int32, Shaped, UInt16, UInt64

from lvm.common import files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.common.ranges import Range
from lvm.data.mixture import split
from lvm.data.store.grid_reads import Damages, Reads

SUFFIX = ".jsonl"
# Byte range of the line, then fields of `format.SCENE_DTYPE`.
_LINE_DTYPE = np.dtype("<u8, <u4, <u2, u1, <i4, <u8")
_LINE_DTYPE.names = ("offset", "size", "frames", "stream_set", "class_id", "group")


@dataclasses.dataclass(frozen=True)
class JsonlFormat:
    """Properties of the tokenizer that made a JSONL file; the defaults are those of LVM's published one.

    Attributes:
      num_codes: codebook size.
      grid: rows and columns of an image's codes.
    """

    num_codes: int = 8192
    grid: tuple[int, ...] = (16, 16)

    def __post_init__(self) -> None:
        if not 0 < self.num_codes <= 2**16:
            raise UserError(f"num_codes={self.num_codes} must be in 1..{2**16}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise UserError(f"grid={self.grid} must be two positive numbers, rows and columns")


def encode_line(codes: Shaped[np.ndarray, "grids N"]) -> str:
    """Formats the codes of a sentence as a line, newline included."""
    return json.dumps({"tokens": base64.b64encode(codes.astype("<i4").tobytes()).decode()}) + "\n"


def decode_line(line: bytes) -> Int32[np.ndarray, " tokens"]:
    """Parses the tokens of a line. Raises ValueError if it isn't in the format."""
    try:
        return np.frombuffer(base64.b64decode(json.loads(line)["tokens"], validate=True), "<i4")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not {{'tokens': base64}}: {error}") from error


def decode_grids(line: bytes, format: JsonlFormat) -> Int32[np.ndarray, "grids N"]:
    """Parses the codes of a line. Raises ValueError if they don't fit `format`."""
    tokens = decode_line(line)
    codes_per_image = format.grid[0] * format.grid[1]
    if not len(tokens) or len(tokens) % codes_per_image:
        raise ValueError(f"{len(tokens)} tokens are not a multiple of {codes_per_image} codes per image (grid)")
    if tokens.min() < 0 or tokens.max() >= format.num_codes:
        raise ValueError(f"codes are in [{tokens.min()}, {tokens.max()}], expected [0, {format.num_codes}) (num_codes)")
    return tokens.reshape(-1, codes_per_image)


@dataclasses.dataclass(frozen=True)
class LineReads(Reads):
    """Grids of a local file's lines, read already."""

    codes: UInt16[np.ndarray, "n N"]

    def start(self) -> list[tuple[Range, np.ndarray]]:
        return []

    def finish(self) -> tuple[np.ndarray, Damages]:
        return self.codes, {}


class JsonlStore:
    """A JSONL file with the part of `lvm.data.store.reader.Store`'s interface that mixtures use.

    A line's group is its content: duplicates are in the same split, and count as repetitions.

    Raises:
      UserError: a line that isn't a sentence of this format; names file and line.
    """

    classes: tuple[str, ...] = ()
    stream_sets = (("rgb",),)
    kinds = None  # the index beside the file is on local disk

    def __init__(self, path: epath.PathLike, format: JsonlFormat):
        self.path, self._format = epath.Path(path), format
        self.num_codes, self.codes_per_image = format.num_codes, format.grid[0] * format.grid[1]
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        # Size and modification time tell whether the index is still that of the file.
        stamp = {"bytes": status.st_size, "modified": status.st_mtime_ns, **dataclasses.asdict(format)}
        self._index = self._open_index(files.as_json(stamp))
        self.indexes = [self._index]
        groups = self._index["group"]
        self.group_hashes = (int(groups.min()), int(groups.max())) if len(groups) else (0, 0)
        tokenizer = {"weights": "", "hash": "", "grid": list(format.grid), "num_codes": format.num_codes}
        self.manifest: dict[str, Any] = {"tokenizer": tokenizer, "source": {"jsonl": self.path.name}}

    def __reduce__(self) -> tuple[type[JsonlStore], tuple[str, JsonlFormat]]:
        return JsonlStore, (os.fspath(self.path), self._format)

    def __len__(self) -> int:
        return len(self._index)

    def identity(self) -> str:
        """Hash of every line's content, in order."""
        return f"{split.content_hash(np.ascontiguousarray(self._index['group']).tobytes()):016x}"

    def heldout_scenes(self, fraction: float) -> None:
        """See `Store.heldout_scenes`."""

    def entries(self, scenes: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        """Index entries of the lines `scenes`."""
        return self._index[scenes]

    def groups(self, scenes: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """See `Store.groups`."""
        return self._index["group"][scenes]

    def grids(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> UInt16[np.ndarray, "n N"]:
        """See `Store.grids`; `streams` are all 0."""
        codes = np.empty((len(entries), self.codes_per_image), np.uint16)
        for offset in np.unique(entries["offset"]).tolist():
            rows = np.flatnonzero(entries["offset"] == offset)
            line = self._content[offset : offset + int(entries["size"][rows[0]])]
            codes[rows] = self._line_grids(line, int(np.searchsorted(self._index["offset"], offset)))[frames[rows]]
        return codes

    def reads(
        self, entries: Shaped[np.ndarray, " n"], frames: Int[np.ndarray, " n"], streams: Int[np.ndarray, " n"]
    ) -> LineReads:
        """See `Store.reads`."""
        return LineReads(self.grids(entries, frames, streams))

    def _line_grids(self, line: bytes, i: int) -> Int32[np.ndarray, "grids N"]:
        """Grids of a line, the `i`-th that isn't blank."""
        try:
            return decode_grids(line, self._format)
        except ValueError as error:
            message = f"{self.path}, sentence {i + 1}: {error}; config.data.jsonl describes the format"
            raise UserError(message) from error

    def _open_index(self, stamp: dict[str, Any]) -> np.ndarray:
        index_path = self.path.parent / f"{self.path.name}.index"
        stamp_path = self.path.parent / f"{self.path.name}.index.json"
        stored = files.read_side_file(stamp_path)
        count = stored.pop("sentences", 0)
        if stored == stamp and files.file_size(index_path) == count * _LINE_DTYPE.itemsize:
            return np.memmap(index_path, _LINE_DTYPE, mode="r") if count else np.zeros(0, _LINE_DTYPE)
        log_info(f"{self.path}: scanning it once for an index")
        index = np.array(list(self._scan()), _LINE_DTYPE)
        try:
            files.write_atomically(index_path, index.tobytes())
            files.write_json(stamp_path, {**stamp, "sentences": len(index)})
        except OSError as error:
            log_info(f"{index_path}: not written ({error.strerror}); every process will scan the file")
        return index

    def _scan(self) -> Iterator[tuple[int, ...]]:
        start, count = 0, 0
        while start < len(self._content):
            end = self._content.find(b"\n", start)
            end = len(self._content) if end < 0 else end
            line = self._content[start:end]
            if line.strip():
                grids = self._line_grids(line, count)
                yield start, end - start, len(grids), 0, -1, split.content_hash(grids.tobytes())
                count += 1
            start = end + 1
