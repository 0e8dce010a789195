"""Image source of ArrayRecord files whose records are image files."""

import os
from collections.abc import Iterator
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from lvm.data.images.sources.base import ImageFileSource
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import relative_to
from lvm.data.images.sources.scene import SceneInfo

Record = tuple[str, int]  # file, and index of the record in it


class ArrayRecordSource(ImageFileSource[Record]):
    """An `ImageSource` of ArrayRecord files whose records are image files: JPEG, PNG and others that Pillow decodes.

    Record 12 of photos.array_record is the scene "photos.array_record/12", one frame of rgb, its own group.
    """

    kind = "array_record"
    scene_noun = "record"
    read_errors = (OSError, ValueError, RuntimeError)
    unpicklable = ("_open_readers",)
    stream_sets = (("rgb",),)

    def _list_file(self, file: str) -> Iterator[tuple[SceneInfo, Record]]:
        count = self._reader(file).num_records()
        if not count:  # also the library's answer for a file of another format
            raise UnreadableError("it has no records")
        for record in range(count):
            key = f"{file}/{record}"
            yield SceneInfo(key, key, "", 1, ("rgb",)), (file, record)

    def _reset(self) -> None:
        self._open_readers: dict[str, Any] = {}

    def _open_scene(self, index: int) -> tuple[SceneInfo, list[dict[str, ImageFile]]]:
        info, (file, record) = self._scene(index)
        return info, [{"rgb": ImageFile(info.key, lambda: self._read(file, record))}]

    def _read(self, file: str, record: int) -> bytes:
        try:
            return self._reader(file).read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError) as error:
            raise UnreadableError(f"the record can't be read: {relative_to(self._root, error)}") from error

    def _reader(self, file: str) -> Any:
        if file not in self._open_readers:
            path = self._folder.local(file)
            if not path.stat().st_size:
                raise UnreadableError("the file is empty (0 bytes)")
            self._open_readers[file] = ArrayRecordReader(os.fspath(path), "readahead_buffer_size:0")
        return self._open_readers[file]
