"""Prompts made of files: which images, in which order, and what stands above each when it is shown."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence

import av
import numpy as np
from PIL import Image

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.image_file import IMAGE_SUFFIXES
from lvm.data.images.sources.listing import VIDEO_SUFFIXES, natural_key
from lvm.data.images.sources.video import VideoSource
from lvm.inference.contact_sheet import Cell, render_sheet

ReadImage = Callable[[pathlib.Path], np.ndarray]  # a picture file → its image uint8 [R, R, 3]
_ALL = 1 << 20  # frames of a video that is taken whole
_VIDEO_SIDE, _FRAMES_A_SECOND = 256, 4


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Images to ask with.

    Attributes:
      labels: what each is called.
      images: uint8 [K, R, R, 3].
      num_answers: images that answer it: of a query as many as its examples have.
    """

    labels: tuple[str, ...]
    images: np.ndarray
    num_answers: int = 1


class PromptReader:
    """Reads pictures, folders of pictures and videos.

    Args:
      read: reads a picture file; raises UserError naming it.
      preprocess: how frames of videos become images.
      rate: frames a second that are taken of videos; 0 is all.
      frames: of folders and videos, the first so many; 0 is all.
      check: is told of how many images a folder or video is before any is read, and may refuse them.
    """

    def __init__(
        self,
        read: ReadImage,
        preprocess: Preprocess,
        rate: float = 0.0,
        frames: int = 0,
        check: Callable[[int], None] = lambda count: None,
    ):
        self._read, self._preprocess, self._rate, self._frames = read, preprocess, rate, frames
        self._check = check

    def images(self, path: str) -> list[np.ndarray]:
        """The images of a picture, a folder (its pictures in natural order) or a video, each uint8 [R, R, 3].

        Raises:
          UserError: it can't be read, or is a folder without pictures.
        """
        place = pathlib.Path(path)
        if place.is_dir():
            self._check(len(files := self._listed(place)))
            return [self._read(file) for file in files]
        if place.suffix.lower() not in VIDEO_SUFFIXES:
            return [self._read(place)]
        source = VideoSource(self._preprocess, path=path, rate=self._rate, clip_frames=self._frames or _ALL)
        self._check(source.info(0).num_frames)
        scene = source.load(0)
        if scene.failures:
            raise UserError(f"{path}: {scene.failures[0].reason}")
        return list(scene.images[:, 0])

    def image(self, path: str) -> np.ndarray:
        """The only image of a path, uint8 [R, R, 3]. Raises UserError as `images` does, and where there are more."""
        images = self.images(path)
        if len(images) != 1:
            raise UserError(f"{path}: holds {len(images)} images; wanted one picture")
        return images[0]

    def sequence(self, paths: Sequence[str]) -> Prompt:
        """All images of the paths, one after the other. Raises UserError as `images` does."""
        images = [image for path in paths for image in self.images(path)]
        return Prompt(tuple(str(number) for number in range(1, len(images) + 1)), np.stack(images))

    def pairs(self, examples: Sequence[str], query: str) -> Prompt:
        """Examples `x:y`, then the query that is to be answered likewise.

        `x:y:z` shows two answers, one after the other. `x:y+z` shows one that combines two: z is laid over y wherever
        it isn't black, as boxes, poses and edges are drawn. A member that is a folder stands for its pictures in turn.

        Raises:
          UserError: an example of another form than the first or without an answer, folders of unequal
            contents, a query that isn't one picture, or what can't be read.
        """
        rows = [row for example in examples for row in self._rows(example)]
        counts = {len(row) for row in rows}
        if len(counts) > 1:
            raise UserError(
                f"--pairs: examples of {' and '.join(map(str, sorted(counts)))} images; all must have as many"
            )
        asked = self.image(query)
        names = "xyz" if (width := counts.pop()) <= 3 else [f"{i}." for i in range(width)]
        labels = [f"{name}{number}" for number in range(1, len(rows) + 1) for name in names[:width]]
        images = [image for row in rows for image in row]
        return Prompt((*labels, "query"), np.stack([*images, asked]), width - 1)

    def _rows(self, example: str) -> list[list[np.ndarray]]:
        members = [member.split("+") for member in example.split(":")]
        if len(members) < 2 or not all(path for member in members for path in member):
            raise UserError(f"--pairs: {example!r} is not of the form image.png:answer.png")
        paths = [path for member in members for path in member]
        folders = [path for path in paths if pathlib.Path(path).is_dir()]
        if not folders:
            return [[self._combined(member) for member in members]]
        stems = {path: [file.stem for file in self._listed(pathlib.Path(path))] for path in folders}
        for path in paths:
            if stems.get(path) != stems[folders[0]]:
                raise UserError(
                    f"--pairs: {folders[0]} and {path} are not two folders of pictures of the same names"
                )
        self._check(len(stems[folders[0]]) * len(members))
        return [
            [
                self._combined([str(self._listed(pathlib.Path(path))[i]) for path in member])
                for member in members
            ]
            for i in range(len(stems[folders[0]]))
        ]

    def _combined(self, paths: Sequence[str]) -> np.ndarray:
        lowest, *others = [self._read(pathlib.Path(path)) for path in paths]
        for image in others:
            lowest = np.where(image.any(axis=-1, keepdims=True), image, lowest)
        return lowest

    def _listed(self, folder: pathlib.Path) -> list[pathlib.Path]:
        files = [
            file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."
        ]
        if not files:
            raise UserError(f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        return sorted(files, key=lambda file: natural_key(file.name))[: self._frames or None]


def answer_sheet(prompt: Prompt, answers: np.ndarray, side: int) -> np.ndarray:
    """The prompt, and its answers uint8 [C, A, R, R, 3] framed, a candidate a row → uint8 [H, W, 3]."""
    shown = [Cell(image, label) for label, image in zip(prompt.labels, prompt.images, strict=True)]
    rows: list[list[Cell | None]] = []
    for number, candidate in enumerate(answers):
        labels = [f"answer {number + 1}" if len(answers) > 1 else "answer"] * len(candidate)
        framed = [Cell(image, label, True) for image, label in zip(candidate, labels, strict=True)]
        rows.append([*(shown if number == 0 else [None] * len(shown)), *framed])
    return render_sheet(rows, side)


def encode_mp4(images: np.ndarray) -> bytes:
    """Images uint8 [T, R, R, 3] as an MP4 of a few frames a second, small ones enlarged."""
    scale = max(1, _VIDEO_SIDE // images.shape[1])
    side = images.shape[1] * scale // 2 * 2  # the format wants even sides
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FRAMES_A_SECOND)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for image in images:
            picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()
