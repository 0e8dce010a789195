"""Prompts read from image files, folders and videos."""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Sequence

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.listing import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_key, suffix_of
from lvm.data.images.sources.video import VideoSource
from lvm.inference.contact_sheet import Cell, Pixels, render_sheet

ReadImage = Callable[[pathlib.Path], np.ndarray]  # path of an image file → uint8 [R, R, 3]
_ALL_FRAMES = 1 << 20
_MIN_VIDEO_SIZE, _VIDEO_FPS = 256, 4


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Images of a prompt, with a label each; an answer to a query has as many images as those of its examples."""

    labels: tuple[str, ...]
    images: UInt8[np.ndarray, "K R R 3"]
    num_answers: int = 1


class PromptReader:
    """Reads prompts from files.

    Args:
      read_file: reads an image file; raises UserError naming it.
      preprocess: applied to frames of videos.
      rate: frames per second taken of videos; 0 takes all.
      max_frames: takes only the first frames of folders and videos; 0 takes all.
      check_count: called with the number of images of a folder or video before any is read; may raise UserError.
    """

    def __init__(
        self,
        read_file: ReadImage,
        preprocess: Preprocess,
        rate: float = 0.0,
        max_frames: int = 0,
        check_count: Callable[[int], None] = lambda count: None,
    ):
        self._read_file, self._preprocess, self._check_count = read_file, preprocess, check_count
        self._rate, self._max_frames = rate, max_frames

    def read_images(self, path: str) -> list[UInt8[np.ndarray, "R R 3"]]:
        """Images of an image file, a folder (in natural order) or a video. Raises UserError if there are none."""
        file = pathlib.Path(path)
        if file.is_dir():
            self._check_count(len(listed := self._list(file)))
            return [self.read_image(str(member)) for member in listed]
        if suffix_of(file) not in VIDEO_SUFFIXES:
            return [self._read_file(file)]
        frames = self._max_frames or _ALL_FRAMES
        source = VideoSource(self._preprocess, path=path, rate=self._rate, clip_frames=frames)
        self._check_count(source.info(0).num_frames)
        scene = source.load(0)
        failures = scene.failures
        if len(source) == 1:  # it reaches the file's end, which may be missing
            failures += source.skipped
        if failures:
            raise UserError(f"{path}: {failures[0].reason}")
        return list(scene.images[:, 0])

    def read_image(self, path: str) -> UInt8[np.ndarray, "R R 3"]:
        """The only image of a path. Raises UserError as `read_images`, and for more than one image."""
        images = self.read_images(path)
        if len(images) != 1:
            raise UserError(f"{path} holds {len(images)} images; give a single image")
        return images[0]

    def read_sequence(self, paths: Sequence[str]) -> Prompt:
        """All images of the paths in order. Raises UserError as `read_images`."""
        images = [image for path in paths for image in self.read_images(path)]
        return Prompt(tuple(str(i) for i in range(1, len(images) + 1)), np.stack(images))

    def read_pairs(self, examples: Sequence[str], query: str) -> Prompt:
        """Examples `x:y`, then the query.

        `x:y:z` has two answers, one after the other. `x:y+z` has one that combines two: z is pasted over y wherever it
        isn't black, as in renderings of boxes, poses and edges. A folder stands for its images, paired by file name.

        Raises UserError for examples without an answer or of different lengths, folders of different contents, a query
        of more than one image, or an unreadable file.
        """
        rows = [row for example in examples for row in self._read_example(example)]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise UserError(
                f"--pairs: examples of {' and '.join(map(str, sorted(lengths)))} images; give all the same number"
            )
        return pairs_prompt(rows, self.read_image(query))

    def _read_example(self, example: str) -> list[list[np.ndarray]]:
        """The rows of images that `x:y…` stands for: several if its members are folders."""
        members = split_example(example)
        paths = [path for member in members for path in member]
        if len(members) < 2 or not all(paths):
            raise UserError(f"--pairs: {example!r} is not of the form image.png:answer.png")
        listed = {path: self._list(pathlib.Path(path)) for path in paths if pathlib.Path(path).is_dir()}
        if not listed:
            return [[self._overlay(member) for member in members]]
        stems = {path: [file.stem for file in files] for path, files in listed.items()}
        first, count = next(iter(stems)), len(next(iter(stems.values())))
        for path in paths:
            if stems.get(path) != stems[first]:
                raise UserError(f"--pairs: {first} and {path} are not two folders of images with the same names")
        self._check_count(count * len(members))
        return [[self._overlay([listed[p][i] for p in member]) for member in members] for i in range(count)]

    def _overlay(self, paths: Sequence[str | pathlib.Path]) -> np.ndarray:
        """Pastes each image over the preceding ones wherever it isn't black."""
        result, *others = [self.read_image(str(path)) for path in paths]
        for image in others:
            result = np.where(image.any(axis=-1, keepdims=True), image, result)
        return result

    def _list(self, folder: pathlib.Path) -> list[pathlib.Path]:
        files = [f for f in folder.iterdir() if suffix_of(f) in IMAGE_SUFFIXES and f.name[0] != "."]
        if not files:
            raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        return sorted(files, key=lambda file: natural_key(file.name))[: self._max_frames or None]


def split_example(example: str) -> list[list[str]]:
    """`x:y+z` → [[x], [y, z]], where `:` and `+` may also be part of the name of a file that exists."""
    return _split_at_files(example) or [member.split("+") for member in example.split(":")]


def _split_at_files(example: str) -> list[list[str]]:
    """The split into paths that all exist, the shortest first; [] if there is none."""
    for separator in [*re.finditer("[:+]", example), None]:
        path = example[: separator.start()] if separator else example
        if path and pathlib.Path(path).exists():
            if separator is None:
                return [[path]]
            if rest := _split_at_files(example[separator.end() :]):
                return [[path], *rest] if separator[0] == ":" else [[path, *rest[0]], *rest[1:]]
    return []


def pairs_prompt(rows: Sequence[Sequence[np.ndarray]], query: UInt8[np.ndarray, "R R 3"]) -> Prompt:
    """Prompt of examples (an image and its answers, all of the same number) and a query."""
    width = len(rows[0])
    names = "xyz" if width <= 3 else [f"{i}." for i in range(width)]
    labels = [f"{name}{i}" for i in range(1, len(rows) + 1) for name in names[:width]]
    images = [image for row in rows for image in row]
    return Prompt((*labels, "query"), np.stack([*images, query]), width - 1)


def answer_sheet(prompt: Prompt, answers: UInt8[np.ndarray, "C A R R 3"], side: int) -> Pixels:
    """Renders the prompt and its framed answers, one candidate per row."""
    cells = [Cell(image, label) for label, image in zip(prompt.labels, prompt.images, strict=True)]
    rows: list[list[Cell | None]] = []
    for index, candidate in enumerate(answers):
        label = f"answer {index + 1}" if len(answers) > 1 else "answer"
        framed = [Cell(image, label, True) for image in candidate]
        rows.append([*(cells if index == 0 else [None] * len(cells)), *framed])
    return render_sheet(rows, side)


def encode_mp4(images: UInt8[np.ndarray, "T R R 3"]) -> bytes:
    """Encodes frames as an MP4 of a few frames per second, small ones enlarged."""
    scale = max(1, _MIN_VIDEO_SIZE // images.shape[1])
    size = images.shape[1] * scale // 2 * 2  # yuv420p needs an even size
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_VIDEO_FPS)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for image in images:
            frame = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()
