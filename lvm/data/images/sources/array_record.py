"""Scenes from ArrayRecord files whose records are picture files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from array_record.python import array_record_module

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Failure, SceneImages, SceneInfo
from lvm.data.images.sources.image_file import ImageFile, UnreadableError
from lvm.data.images.sources.listing import check_index, find_files, hash_files, relative_to
from lvm.data.images.sources.readers import FrameReader, make_readers
from lvm.data.streams.codecs import Codec


@dataclasses.dataclass(frozen=True)
class ArrayRecordConfig:
    """The parameters of ArrayRecord files.

    Attributes:
      path: a file, a folder of them, or a pattern such as "photos-*.array_record".
    """

    kind: ClassVar[str] = "array_record"
    path: str = ""


class ArrayRecordSource:
    """An `ImageSource` of ArrayRecord files whose records are picture files: JPEG, PNG and what else Pillow decodes.

    Record 12 of photos.array_record is the scene "photos.array_record/12", one frame of rgb, its own group.

    Args:
      preprocess: how pictures become images.
      **parameters: the fields of `ArrayRecordConfig`.

    Raises:
      UserError: there is no such file, or there are no records in them.
    """

    classes: tuple[str, ...] = ()
    stream_sets: tuple[tuple[str, ...], ...] = (("rgb",),)

    def __init__(self, preprocess: Preprocess, **parameters: Any) -> None:
        self.config: ArrayRecordConfig = from_config_dict(ArrayRecordConfig, parameters, "array_record")
        skipped: list[Failure] = []
        self._root, found = find_files(self.config.path, (".array_record", ".arrayrecord"), skipped)
        self._readers: dict[str, Any] = {}
        self._files: list[str] = []
        counts: list[int] = []
        for file in found:
            try:
                count = self._reader(file).num_records()
                if not count:  # also what the library makes of a file of something else
                    raise UnreadableError("it has no records")
                counts.append(count)
                self._files.append(file)
            except OSError as error:
                skipped.append(Failure(file, f"can't be read: {error.strerror}"))
            except (UnreadableError, ValueError, RuntimeError) as error:
                skipped.append(Failure(file, f"not used: {relative_to(self._root, error)}"))
        self._starts = np.cumsum([0, *counts])
        if not len(self):
            reason = skipped[0].reason if skipped else "they are empty"
            raise UserError(f"{self.config.path}: no records in its files: {reason}")
        self.name = self._root.resolve().name
        self.skipped = tuple(skipped)
        self._frames = FrameReader(make_readers(self._root, {"rgb": ()}), preprocess)
        self.streams: Mapping[str, Codec] = self._frames.streams

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def info(self, index: int) -> SceneInfo:
        """See `ImageSource.info`."""
        file, record = self._place(index)
        key = f"{file}/{record}"
        return SceneInfo(key, key, "", 1, ("rgb",))

    def load(self, index: int) -> SceneImages:
        """See `ImageSource.load`."""
        file, record = self._place(index)
        return self._frames.load(
            self.info(index), [{"rgb": ImageFile(f"{file}/{record}", lambda: self._read(file, record))}]
        )

    def describe(self) -> dict[str, Any]:
        """See `ImageSource.describe`."""
        listing = hash_files(self._root, self._files)
        return {"kind": self.config.kind, "num_scenes": len(self), "listing": listing}

    def _place(self, index: int) -> tuple[str, int]:
        check_index(index, len(self))
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[file], index - int(self._starts[file])

    def _read(self, file: str, record: int) -> bytes:
        try:
            return self._reader(file).read(record, record + 1)[0]
        except (IndexError, ValueError, RuntimeError) as error:
            raise UnreadableError(f"the record can't be read: {relative_to(self._root, error)}") from error

    def _reader(self, file: str) -> Any:
        if file not in self._readers:
            path = self._root / file
            if not path.stat().st_size:
                raise UnreadableError("the file is empty (0 bytes)")
            self._readers[file] = array_record_module.ArrayRecordReader(
                os.fspath(path), "readahead_buffer_size:0"
            )
        return self._readers[file]
