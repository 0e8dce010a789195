"""Layouts of folders: subfolders that are videos, and those that are classes."""

import pathlib

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.data.images.sources import open_source
from tests.lvm.data.images.sources.test_folder import exact, save


def photos_of_classes(folder: pathlib.Path, numbers: list[int], sizes: list[int]) -> None:
    for name in ("n01440764", "n01443537"):
        for number, size in zip(numbers, sizes, strict=True):
            save(folder / name / f"{name}_{number}.JPEG", np.full((size, 8, 3), number, np.uint8))


@pytest.mark.parametrize("split", ["", "train/"])
def test_photos_of_different_sizes_are_classes(tmp_path, split, caplog) -> None:
    photos_of_classes(tmp_path / split, [1, 2, 30], [8, 10, 9])
    save(tmp_path / "alone.png")
    with caplog.at_level("INFO"):
        source = open_source(str(tmp_path), exact)
    infos = [source.info(i) for i in range(len(source))]
    names = [f"{split}{name}/{name}_{number}.JPEG" for name in ("n01440764", "n01443537") for number in (1, 2, 30)]
    assert [info.key for info in infos] == [info.group for info in infos] == ["alone.png", *names]
    assert [info.class_name for info in infos] == ["", *["n01440764"] * 3, *["n01443537"] * 3]
    assert source.classes == ("n01440764", "n01443537")
    assert {(info.num_frames, info.streams) for info in infos} == {(1, ("rgb",))}
    assert "2 subfolders read as classes, of 6 photos" in caplog.text
    assert source.describe()["layout"] == "classes"


def test_layout_must_be_given_where_files_do_not_tell(tmp_path, caplog) -> None:
    photos_of_classes(tmp_path, [1, 2, 30, 77], [8] * 4)
    with pytest.raises(UserError, match='give layout="videos" or layout="classes"'):
        open_source(str(tmp_path), exact)
    classes = open_source(str(tmp_path), exact, {"layout": "classes"})
    assert (len(classes), classes.classes) == (8, ("n01440764", "n01443537"))
    with caplog.at_level("INFO"):
        videos = open_source(str(tmp_path), exact, {"layout": "videos"})
    assert (len(videos), videos.classes, "layout" in videos.describe()) == (2, (), False)
    assert '2 subfolders read as videos, of 8 frames; layout="classes" reads them as classes' in caplog.text
    with pytest.raises(UserError, match=r"layout='class' must be one of auto, videos, classes"):
        open_source(str(tmp_path), exact, {"layout": "class"})


@pytest.mark.parametrize("count", [1, 4])
def test_frames_in_a_folder_of_a_split_are_ambiguous(tmp_path, count) -> None:
    for split in ("train", "val"):
        for i in range(count):
            save(tmp_path / split / "cat" / f"{i}.png")
    with pytest.raises(UserError, match='give layout="videos" or layout="classes"'):
        open_source(str(tmp_path), exact)
    source = open_source(str(tmp_path), exact, {"layout": "classes"})
    assert [source.info(i).key for i in (0, count)] == ["train/cat/0.png", "val/cat/0.png"]
    assert source.classes == ("cat",)


def test_videos_beside_photos_of_different_sizes_are_ambiguous(tmp_path) -> None:
    for i in range(3):
        save(tmp_path / "walk" / f"{i}.png")
    assert len(open_source(str(tmp_path), exact)) == 1
    for side in (4, 5, 6):
        save(tmp_path / "album" / f"{side}.png", np.zeros((side, 4, 3), np.uint8))
    with pytest.raises(UserError, match='give layout="videos" or layout="classes"'):
        open_source(str(tmp_path), exact)


def test_video_with_missing_frames_is_a_video(tmp_path) -> None:
    for i in (0, 1, 2, 4, 5, 9):
        save(tmp_path / "walk" / f"{i}.png")
    assert open_source(str(tmp_path), exact).info(0).key == "walk/clip-0000"


def test_classes_have_annotations(tmp_path) -> None:
    for stream, value in (("rgb", 90), ("segmentation", 1)):
        for i, side in enumerate((8, 16, 32)):
            save(tmp_path / stream / "train" / "cat" / f"{i}.png", np.full((side, side), value, np.uint8))
    source = open_source(str(tmp_path), exact)
    info = source.info(0)
    assert (info.key, info.class_name, info.streams) == ("train/cat/0.png", "cat", ("rgb", "segmentation"))
    assert source.load(1).failures == ()
