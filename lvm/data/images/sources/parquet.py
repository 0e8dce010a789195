"""Scenes from Parquet files whose columns hold picture files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import check_index, find_files, hash_files, relative_to
from lvm.data.images.sources.readers import STREAMS, FrameReader, declared_streams, make_readers
from lvm.data.streams.codecs import Codec

_OPEN_GROUPS = 4  # row groups that a process keeps: neighbours are read soon


@dataclasses.dataclass(frozen=True)
class ParquetConfig:
    """The parameters of Parquet files.

    Attributes:
      path: a file, a folder of them, or a pattern such as "data/train-*.parquet".
      streams: the column of each stream; of bytes, or of structs with a field `bytes`, as Hugging Face's image
        columns are. By default the only such column is rgb, and columns named as streams are those.
      key: a column that names the scenes; by default a scene is FILE/ROW.
      group: a column of what must stay on one side of the split; by default each scene is its own.
      class_name: a column of class names.
    """

    kind: ClassVar[str] = "parquet"
    path: str = ""
    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)
    key: str = ""
    group: str = ""
    class_name: str = ""

    def __post_init__(self) -> None:
        if self.streams and "rgb" not in self.streams:
            raise UserError(
                f"streams: {sorted(self.streams)} lack rgb; name the column of every stream that is wanted"
            )


class ParquetSource:
    """An `ImageSource` of Parquet files whose columns hold picture files. A row is a scene of one frame.

    A stream whose column is null in a row is not of that scene; a row without rgb is passed over. Rows are read a
    row group at a time, so files with small row groups are read best.

    Args:
      preprocess: how pictures become images.
      **parameters: the fields of `ParquetConfig`.

    Raises:
      UserError: there is no such file, no row, or a column is missing or of another type.
    """

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: ParquetConfig = from_config_dict(ParquetConfig, parameters, "parquet")
        skipped: list[Failure] = []
        self._root, found = find_files(self.config.path, (".parquet",), skipped)
        self._columns: dict[str, str] = dict(self.config.streams)
        self._files: list[str] = []
        self._rows: list[tuple[SceneInfo, int, int, int]] = []  # info, file, row group, row
        keys: set[str] = set()
        for file in found:
            before = len(self._rows)
            try:
                self._list(len(self._files), file, keys, skipped)
                self._files.append(file)
            except (OSError, pyarrow.ArrowException) as error:
                # What was listed of it goes: the next file gets its number.
                keys.difference_update(info.key for info, *_ in self._rows[before:])
                del self._rows[before:]
                skipped.append(
                    Failure(file, f"no Parquet that can be read: {relative_to(self._root, error)}")
                )
        if not self._rows:
            reason = skipped[0].reason if skipped else "they are empty"
            raise UserError(f"{self.config.path}: no rows to use in its files: {reason}")
        self.name = self._root.resolve().name
        self.skipped = tuple(skipped)
        self.stream_sets: tuple[tuple[str, ...], ...] = tuple(sorted({row[0].streams for row in self._rows}))
        self.classes = tuple(sorted({row[0].class_name for row in self._rows} - {""}))
        self._reset()
        blobs = {stream: self._blobs(stream) for stream in self._columns}
        self._frames = FrameReader(make_readers(self._root, blobs), preprocess)
        self.streams: Mapping[str, Codec] = self._frames.streams

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        check_index(index, len(self))
        return self._rows[index][0]

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        info = self.info(index)
        return self._frames.load(info, [{stream: self._blob(index, stream) for stream in info.streams}])

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        return {
            "kind": self.config.kind,
            "columns": self._columns,
            "streams": {stream: codec.to_json() for stream, codec in self.streams.items()},
            "num_scenes": len(self),
            "listing": hash_files(self._root, self._files),
        }

    def _reset(self) -> None:
        self._groups: collections.OrderedDict[tuple[int, int], pyarrow.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _list(self, number: int, file: str, keys: set[str], skipped: list[Failure]) -> None:
        """Adds the rows of a file."""
        table = pyarrow.parquet.ParquetFile(self._root / file)
        self._columns = self._columns or self._guess(table.schema_arrow)
        names = [name for name in (self.config.key, self.config.group, self.config.class_name) if name]
        for column in (*self._columns.values(), *names):
            if column not in table.schema_arrow.names:
                raise UserError(
                    f"{self._root / file}: no column {column!r}; it has {table.schema_arrow.names}"
                )
        for column in self._columns.values():
            if not _holds_bytes(table.schema_arrow.field(column).type):
                kind = table.schema_arrow.field(column).type
                raise UserError(
                    f"{self._root / file}: column {column!r} is {kind}; expected bytes, or structs of bytes"
                )
        start = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            texts = table.read_row_group(group, columns=names).to_pydict() if names else {}
            missing = {stream: _nulls(table, group, column) for stream, column in self._columns.items()}
            for row in range(rows):
                name = f"{file}/{start + row}"
                key, own_group, class_name = (
                    str(texts[column][row]) if column and texts[column][row] is not None else default
                    for column, default in (
                        (self.config.key, name),
                        (self.config.group, ""),
                        (self.config.class_name, ""),
                    )
                )
                streams = tuple(stream for stream in self._columns if row not in missing[stream])
                if "rgb" not in streams:
                    skipped.append(Failure(name, f"column {self._columns['rgb']!r} is null"))
                elif key in keys:
                    skipped.append(Failure(name, f"its key {key!r} is that of an earlier row, which is used"))
                else:
                    keys.add(key)
                    info = SceneInfo(key, own_group or key, class_name, 1, streams)
                    self._rows.append((info, number, group, row))
            start += rows

    def _guess(self, schema: pyarrow.Schema) -> dict[str, str]:
        """The column of each stream: those named as streams, and the only other one is rgb."""
        columns = [field.name for field in schema if _holds_bytes(field.type)]
        known = (*STREAMS, *declared_streams(self._root))
        named = {stream: stream for stream in known if stream in columns}
        others = [column for column in columns if column not in named]
        if "rgb" not in named and len(others) != 1:
            raise UserError(
                f"{self.config.path}: its columns of bytes are {columns}; name that of each stream, such as "
                'streams={"rgb": "image"}'
            )
        return named if "rgb" in named else {"rgb": others[0], **named}

    def _blob(self, index: int, stream: str) -> ImageFile:
        _, file, group, row = self._rows[index]
        name = f"{self._files[file]}, row {row} of group {group}"
        return ImageFile(name, functools.partial(self._read, file, group, row, self._columns[stream]))

    def _blobs(self, stream: str) -> Iterator[ImageFile]:
        return (self._blob(index, stream) for index, row in enumerate(self._rows) if stream in row[0].streams)

    def _read(self, file: int, group: int, row: int, column: str) -> bytes:
        try:
            value = self._group(file, group).column(column)[row].as_py()
        except (OSError, pyarrow.ArrowException) as error:
            raise UnreadableError(f"the row group can't be read: {relative_to(self._root, error)}") from error
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise UnreadableError(f"column {column!r} is null")
        return value

    def _group(self, file: int, group: int) -> pyarrow.Table:
        with self._lock:  # of several threads that want one group, one reads it
            if (file, group) not in self._groups:
                table = pyarrow.parquet.ParquetFile(self._root / self._files[file])
                columns = list(self._columns.values())
                self._groups[file, group] = table.read_row_group(group, columns=columns, use_threads=False)
                while len(self._groups) > _OPEN_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((file, group))
            return self._groups[file, group]


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _nulls(table: pyarrow.parquet.ParquetFile, group: int, column: str) -> set[int]:
    """The rows of a group in which a column is null; it is only read where its statistics don't say that none is."""
    metadata = table.metadata.row_group(group)
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    mine = next(chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes"))
    if mine.statistics is not None and mine.statistics.null_count == 0:
        return set()
    values = table.read_row_group(group, columns=[column]).column(column)
    if pyarrow.types.is_struct(values.type):
        values = pyarrow.compute.struct_field(values, "bytes")
    return {row for row, null in enumerate(values.is_null().to_pylist()) if null}
