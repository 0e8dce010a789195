"""Image source of ArrayRecord files whose records are image files."""

import os
from collections.abc import Iterator
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from lvm.data.images.sources.base import ImageFileSource
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import failure_reason
from lvm.data.images.sources.scene import SceneInfo

_OPEN_READERS = 128  # per process, each with a descriptor and a thread; training mixes the images of as many files

Record = tuple[str, int]  # file, and index of the record in it


class ArrayRecordSource(ImageFileSource[Record]):
    """An `ImageSource` of ArrayRecord files whose records are image files: JPEG, PNG and others that Pillow decodes.

    Record 12 of photos.array_record is the scene "photos.array_record/12", one frame of rgb, its own group.
    """

    kind = "array_record"
    scene_noun = "record"
    read_errors = (OSError, ValueError, RuntimeError)
    unpicklable = ("_readers_by_file",)
    stream_sets = (("rgb",),)

    def _list_file(self, file: str) -> Iterator[tuple[SceneInfo, Record]]:
        count = self._open_reader(file).num_records()
        if not count:  # also the library's answer for a file of another format
            raise UnreadableError("it has no records")
        for record in range(count):
            key = f"{file}/{record}"
            yield SceneInfo(key, key, "", 1, ("rgb",)), (file, record)

    def _reset(self) -> None:
        self._readers_by_file: dict[str, Any] = {}

    def _open_scene(self, index: int) -> tuple[SceneInfo, list[dict[str, ImageFile]]]:
        info, (file, record) = self._scene(index)
        return info, [{"rgb": ImageFile(info.key, lambda: self._read(file, record))}]

    def _read(self, file: str, record: int) -> bytes:
        try:
            return self._reader(file).read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError) as error:
            raise UnreadableError(f"the record can't be read: {failure_reason(self._root, error)}") from error

    def _reader(self, file: str) -> Any:
        reader = self._readers_by_file.get(file)
        if reader is None:
            for other in [*self._readers_by_file]:  # the first opened first; a removed copy still takes disk space
                if len(self._readers_by_file) >= _OPEN_READERS or not (self._root / other).exists():
                    self._readers_by_file.pop(other, None)
            reader = self._readers_by_file[file] = self._open_reader(file)
        return reader

    def _open_reader(self, file: str) -> Any:
        path = self._folder.local(file)
        with open(path, "rb") as content:  # without descriptors, the library would find no records
            if not content.read(1):
                raise UnreadableError("the file is empty (0 bytes)")
        return ArrayRecordReader(os.fspath(path), "readahead_buffer_size:0")
