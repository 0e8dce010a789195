"""TFDS source: prepared datasets, read without TensorFlow."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.tfds import TfdsSource
from lvm.data.streams.codecs import Depth, Palette
from tests.image_files import BAD_FILES, UNUSUAL_FILES, check_image_files, encode_image, photo

small = Preprocess(16)
Image, Text, Sequence = tfds.features.Image, tfds.features.Text, tfds.features.Sequence


def prepare(folder: pathlib.Path, features: dict, examples: list[dict]) -> dict[str, str]:
    """Prepares a dataset of these examples; returns its source's parameters."""

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The dataset."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Toy(data_dir=folder, file_format="array_record").download_and_prepare()
    return {"name": str(folder / "toy" / "1.0.0")}


def file(content: bytes) -> io.BytesIO:
    return io.BytesIO(content)


PETS = {
    "image": Image(shape=(None, None, 3)),
    "mask": tfds.features.LabeledImage(labels=["background", "cat", "dog"], shape=(None, None, 1)),
    "depth": Image(shape=(None, None, 1), dtype=np.uint16),
    "label": tfds.features.ClassLabel(names=["wild", "tame"]),
    "owner": Text(),
}


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> dict[str, str]:
    examples = [
        {
            "image": file(encode_image(photo(seed=i))),
            "mask": file(encode_image(np.full((32, 48), i, np.uint8))),
            "depth": file(encode_image(np.full((32, 48), 1000 + i, np.uint16))),
            "label": i % 2,
            "owner": "ann" if i < 2 else "bob",
        }
        for i in range(3)
    ]
    return prepare(tmp_path_factory.mktemp("tfds"), PETS, examples)


def test_images_masks_depth_and_classes(pets) -> None:
    source = TfdsSource(small, **pets, group="owner")
    infos = [source.info(i) for i in range(len(source))]
    assert [i.key for i in infos] == ["toy/train/0", "toy/train/1", "toy/train/2"]
    assert [i.class_name for i in infos] == ["wild", "tame", "wild"]
    assert [i.group for i in infos] == ["ann", "ann", "bob"]
    assert source.classes == ("tame", "wild")
    assert source.stream_sets == (("rgb", "segmentation", "depth"),)
    assert source.streams["segmentation"] == Palette(("background", "cat", "dog"), background=0)
    assert isinstance(source.streams["depth"], Depth)
    scene = source.load(2)
    assert (source.streams["segmentation"].parse(scene.images[0, 1]) == 2).all()
    assert np.abs(source.streams["depth"].parse(scene.images[0, 2]) - 1002).max() < 25
    np.testing.assert_array_equal(scene.images[0, 0], small(photo(seed=2)))
    assert "tensorflow" not in sys.modules


def test_dataset_by_name_and_split(pets) -> None:
    folder = pathlib.Path(pets["name"])
    named = TfdsSource(small, name="toy", data_dir=str(folder.parents[1]), split="train[1:]", streams={"rgb": "image"})
    assert len(named) == 2
    assert named.stream_sets == (("rgb",),)
    np.testing.assert_array_equal(named.load(0).images[0, 0], small(photo(seed=1)))
    assert str(folder.parents[1]) not in json.dumps(named.describe())
    copy = pickle.loads(pickle.dumps(named))
    np.testing.assert_array_equal(copy.load(1).images, named.load(1).images)
    with pytest.raises(IndexError):
        named.load(2)


def test_image_sequences_are_videos(tmp_path) -> None:
    features = {"clip": Sequence({"frames": Image(shape=(None, None, 3)), "masks": Image(shape=(None, None, 1))})}
    examples = [
        {
            "clip": {
                "frames": [file(encode_image(photo(seed=i))) for i in range(frames)],
                "masks": [file(encode_image(np.full((32, 48), 255, np.uint8))) for _ in range(frames)],
            }
        }
        for frames in (3, 1)
    ]
    where = prepare(tmp_path, features, examples)
    source = TfdsSource(small, **where, streams={"rgb": "clip/frames", "segmentation": "clip/masks"})
    assert [source.info(i).num_frames for i in range(2)] == [3, 1]
    scene = source.load(0)
    assert scene.images.shape == (3, 2, 16, 16, 3)
    assert scene.failures == ()
    np.testing.assert_array_equal(scene.images[2, 0], small(photo(seed=2)))
    assert source.streams["segmentation"].names == ("background", "foreground")
    with pytest.raises(UserError, match="columns of images are clip/frames, clip/masks"):
        TfdsSource(small, **where)


@pytest.mark.parametrize("order", [("rgb", "edges"), ("edges", "rgb")])
@pytest.mark.parametrize(("frames", "edges"), [(2, 3), (3, 2)])
def test_frames_are_counted_by_rgb(tmp_path, order, frames, edges) -> None:
    image = Image(shape=(None, None, 3))
    example = {
        "rgb": [file(encode_image(photo(seed=i))) for i in range(frames)],
        "edges": [file(encode_image(photo(seed=9))) for _ in range(edges)],
    }
    where = prepare(tmp_path, {"rgb": Sequence(image), "edges": Sequence(image)}, [example])
    source = TfdsSource(small, **where, streams={stream: stream for stream in order})
    assert (source.info(0).num_frames, source.info(0).streams) == (frames, order)
    scene = source.load(0)
    assert len(scene.images) == 2
    np.testing.assert_array_equal(scene.images[1, order.index("rgb")], small(photo(seed=1)))
    blamed, reason = ("edges 2", "rgb has 2 frames") if edges > frames else ("edges 2", "edges has 2 frames")
    assert [failure.reason for failure in scene.failures] == [f"{blamed}: {reason}"]


def test_tfds_lists_bad_files_and_reads_unusual_ones(tmp_path) -> None:
    files = {name: content for name, (content, _) in (BAD_FILES | UNUSUAL_FILES).items()}
    examples = [{"image": file(content)} for content in files.values()]
    source = TfdsSource(small, **prepare(tmp_path, {"image": Image(shape=(None, None, 3))}, examples))
    check_image_files(source, lambda key: list(files)[int(key.rpartition("/")[2])])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"split": "test"}, "and a split of it"),
        ({"streams": {"rgb": "owner"}}, "no image feature 'owner'"),
        ({"streams": {"depth": "depth"}}, r"tfds\.streams: \['depth'\]"),
        ({"class_name": "owner"}, "'owner' is no ClassLabel"),
        ({"group": "town"}, "no feature 'town'"),
        ({"name": "no_such_dataset"}, "no_such_dataset: tensorflow-datasets: DatasetNotFoundError"),
        ({"name": ""}, r"tfds\.name is missing"),
    ],
)
def test_tfds_rejects_bad_parameters(pets, parameters, message) -> None:
    with pytest.raises(UserError, match=message):
        TfdsSource(small, **(pets | parameters))


def test_missing_package_is_named(pets, tmp_path, monkeypatch) -> None:
    # A Video feature needs TensorFlow, which isn't installed.
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    for path in pathlib.Path(pets["name"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    module = "tensorflow_datasets.core.features"
    video = {
        "pythonClassName": f"{module}.video_feature.Video",
        "video": {
            "shape": {"dimensions": ["-1", "-1", "-1", "3"]},
            "dtype": "uint8",
            "encodingFormat": "png",
        },
    }
    described = {
        "pythonClassName": f"{module}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"video": video}},
    }
    (folder / "features.json").write_text(json.dumps(described))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="tensorflow-datasets needs the package 'tensorflow' for this dataset"):
        TfdsSource(small, name=str(folder))
