"""Image source of Parquet files whose columns hold image files."""

import dataclasses
import functools
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import ImageFileSource, PathConfig
from lvm.data.images.sources.division import split_range
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import failure_reason
from lvm.data.images.sources.readers import STREAMS, match_columns
from lvm.data.images.sources.scene import SceneInfo

_CACHED_GROUPS = 4  # row groups kept in memory per process: neighboring rows are read soon


Row = tuple[str, int, int]  # file, row group, row in the group


@dataclasses.dataclass(frozen=True)
class ParquetConfig(PathConfig):
    """Parameters of a Parquet source.

    Attributes:
      streams: column of each stream; of bytes, or of structs with a field `bytes`, as Hugging Face's image columns.
        Scenes have this order. By default columns named as streams are those, and the only other such column is rgb.
      key: column of scene keys; by default the key is FILE/ROW.
      group: column of what a split must not separate; by default each scene is its own group.
      class_name: column of class names.
    """

    streams: Mapping[str, str] = dataclasses.field(default_factory=dict)
    key: str = ""
    group: str = ""
    class_name: str = ""


class ParquetSource(ImageFileSource[Row]):
    """An `ImageSource` of Parquet files whose columns hold image files. A row is a scene of one frame.

    A row has the streams whose columns are not null; one without rgb is skipped. Files are read a row group at a time,
    so small row groups are fastest.

    Raises:
      UserError: no such file, no row, or a column that is missing or of another type.
    """

    kind = "parquet"
    config_class = ParquetConfig
    scene_noun = "row"
    read_errors = (OSError, ValueError, pyarrow.ArrowException)  # ValueError for text that is not UTF-8
    unpicklable = ("_cached_group", "_lock")

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        super().__init__(preprocess, **parameters)
        self._columns = self._columns or self._match_columns()
        self._stream_names = tuple(self._columns)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"columns": self._columns}

    def _reset(self) -> None:
        self._cached_group = functools.lru_cache(_CACHED_GROUPS)(self._load_group)
        self._lock = threading.Lock()

    def _open_scene(self, index: int) -> tuple[SceneInfo, list[dict[str, ImageFile]]]:
        info, (file, group, row) = self._scene(index)
        name = f"{file}, row {row} of group {group}"
        read = lambda s: functools.partial(self._read, file, group, row, self._columns[s])  # noqa: E731
        return info, [{stream: ImageFile(name, read(stream)) for stream in info.streams}]

    def _list_range(self, file: str, piece: int, pieces: int) -> Iterable[tuple[SceneInfo, Row]]:
        """See `SceneSource._list_range`. A range is of whole row groups if there are enough of them."""
        # Without a buffer for the whole column, only what is needed is read.
        path = self._folder.local(file)
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False) as table:
            num_groups = table.num_row_groups
            self._check_columns(file, table.schema_arrow, is_first=piece == 0)
            if num_groups >= pieces:
                return self._list_groups(file, table, range(*split_range(num_groups, piece, pieces)))
            num_skipped = len(self._skipped)
            scenes = self._list_groups(file, table, range(num_groups))
            if piece:
                del self._skipped[num_skipped:]
            return scenes[slice(*split_range(len(scenes), piece, pieces))]

    def _list_groups(self, file: str, table: pyarrow.parquet.ParquetFile, groups: range) -> list[tuple[SceneInfo, Row]]:
        config, scenes = self.config, dict[str, tuple[SceneInfo, Row]]()
        start = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        text_columns = [name for name in (config.key, config.group, config.class_name) if name]
        for group in groups:
            texts = table.read_row_group(group, columns=text_columns).to_pydict() if text_columns else {}
            empty = {stream: _empty_rows(table, group, column) for stream, column in self._columns.items()}
            num_rows = table.metadata.row_group(group).num_rows
            for row in range(num_rows):
                name = f"{file}/{start + row}"
                key, own_group, class_name = (
                    str(texts[column][row]) if column and texts[column][row] is not None else default
                    for column, default in ((config.key, name), (config.group, ""), (config.class_name, ""))
                )
                streams = tuple(stream for stream in self._columns if row not in empty[stream])
                if "rgb" not in streams:
                    self._skip(name, f"column {self._columns['rgb']!r} {empty['rgb'][row]}")
                elif key in scenes:
                    self._skip(name, f"its key {key!r} is that of an earlier row, which is used")
                else:
                    info = SceneInfo(key, own_group or key, class_name, 1, streams)
                    scenes[key] = info, (file, group, row)
            start += num_rows
        return list(scenes.values())

    def _match_columns(self) -> dict[str, str]:
        """Returns the column of each stream by the schema of the first readable file, {} if there is none."""
        for file in self._files:
            try:
                schema = self._folder.peek(file, pyarrow.parquet.read_schema, (ValueError, pyarrow.ArrowException))
            except (UnreadableError, *self.read_errors):
                continue  # skipped when it is listed
            named = [
                f.name for f in schema if f.name in self._stream_names and (_holds_bytes(f.type) or _is_null(f.type))
            ]
            others = [f for f in schema if f.name not in self._stream_names and _holds_bytes(f.type)]
            others = [f for f in others if not pyarrow.types.is_fixed_size_binary(f.type)] or others  # of hashes
            try:
                return match_columns([*named, *(field.name for field in others)], self._stream_names)
            except UserError as error:
                raise UserError(f"{self.config.path}: {error}") from error
        return {}

    def _check_columns(self, file: str, schema: pyarrow.Schema, is_first: bool) -> None:
        """Raises UserError for missing columns, and for those of another type."""
        config, path = self.config, f"{self._folder}/{file}"
        for stream in [stream for stream in STREAMS if stream in schema.names and stream not in self._columns]:
            if is_first and not config.streams and _holds_bytes(schema.field(stream).type):
                self._skip(file, f"column {stream!r} is not read: the first file has none")
        for column in (*self._columns.values(), config.key, config.group, config.class_name):
            if column and column not in schema.names:
                raise UserError(f"{path}: no column {column!r}; it has {', '.join(map(repr, schema.names))}")
        for column in self._columns.values():
            if not (_holds_bytes(kind := schema.field(column).type) or _is_null(kind)):
                expected = "expected bytes, or structs of bytes, of image files; paths are not followed"
                raise UserError(f"{path}: column {column!r} is {kind}; {expected}")

    def _read(self, file: str, group: int, row: int, column: str) -> bytes:
        try:
            with self._lock:  # threads that need the same group read it once
                table = self._cached_group(file, group)
            value = table.column(column)[row]
            value = (value["bytes"] if isinstance(value, pyarrow.StructScalar) else value).as_py()
        except (OSError, pyarrow.ArrowException) as error:
            raise UnreadableError(f"the row group can't be read: {failure_reason(self._root, error)}") from error
        if value is None:
            raise UnreadableError(f"column {column!r} is null")
        return value

    def _load_group(self, file: str, group: int) -> pyarrow.Table:
        table = pyarrow.parquet.ParquetFile(self._folder.local(file))
        return table.read_row_group(group, columns=list(self._columns.values()), use_threads=False)


_is_null = pyarrow.types.is_null  # of a column without any value


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and not types.is_struct(child := kind.field(index).type) and _holds_bytes(child)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in is_bytes)


def _empty_rows(table: pyarrow.parquet.ParquetFile, group: int, column: str) -> dict[int, str]:
    """Returns the rows of a group without bytes, and why; reads the column only if its statistics allow a null."""
    leaves = [table.schema.column(i) for i in range(len(table.schema))]
    leaf = next((i for i, leaf in enumerate(leaves) if leaf.path in (column, f"{column}.bytes")), -1)
    if leaf < 0:
        raise UnreadableError(f"damaged: its two schemas differ in column {column!r}")
    # pyarrow ends the process at damaged metadata of a column, unless a batch, here of no rows, raises an error first.
    next(table.reader.iter_batches(0, row_groups=[group], column_indices=[leaf], use_threads=False), None)
    metadata = table.metadata.row_group(group)
    chunk = metadata.column(leaf)
    if (chunk.physical_type, chunk.num_values) != (leaves[leaf].physical_type, metadata.num_rows):
        raise UnreadableError(f"damaged: column {column!r} of group {group} differs from the schema or number of rows")
    if chunk.statistics is not None and chunk.statistics.null_count == 0:
        return {}
    values = table.read_row_group(group, columns=[column]).column(column)
    is_struct = pyarrow.types.is_struct(values.type)
    nulls = pyarrow.compute.struct_field(values, "bytes").is_null() if is_struct else values.is_null()
    has_paths = is_struct and values.type.get_field_index("path") >= 0
    paths = pyarrow.compute.struct_field(values, "path").to_pylist() if has_paths else [None] * len(values)
    return {
        row: f"holds the path {path!r} and no bytes; embed the image files in the Parquet file" if path else "is null"
        for row, (null, path) in enumerate(zip(nulls.to_pylist(), paths, strict=True))
        if null
    }
