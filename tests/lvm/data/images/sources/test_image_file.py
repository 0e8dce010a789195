"""Picture files of every kind, good and bad, from folders; and decoding at a fraction of the size."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import KINDS, _open, open_source
from lvm.data.images.sources.image_file import decode_image, read_image
from lvm.data.streams.derived import DERIVED
from tests.commands import ROOT
from tests.image_files import BAD, ODD, check_image_files, encode_image, photo

small = Preprocess(16)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, (content, _) in (BAD | ODD).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("decode", ["full", "reduced"])
def test_a_folder_lists_bad_pictures_and_reads_odd_ones(pictures, decode) -> None:
    check_image_files(open_source(str(pictures), Preprocess(16, decode=decode)))


def test_a_file_that_can_not_be_read_is_listed(pictures) -> None:
    (pictures / "zz.jpg").symlink_to(pictures / "nowhere")
    source = open_source(str(pictures), small)
    scene = source.load(len(source) - 1)
    assert scene.info.key == "zz.jpg"
    assert scene.failures[0].reason.startswith("zz.jpg: cannot be opened: [Errno 2]")


def test_what_bad_and_odd_pictures_become_does_not_hang_on_the_order(pictures) -> None:
    source = open_source(str(pictures), small)
    forwards = [source.load(i).images.tobytes() for i in range(len(source))]
    backwards = [source.load(i).images.tobytes() for i in reversed(range(len(source)))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("size", [(255, 257), (1025, 771), (900, 300)])
@pytest.mark.parametrize("mode", ["squash", "center_crop"])
def test_reduced_decoding_looks_alike_and_stays_in_place(tmp_path, size, mode) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_image(photo(*size, seed=1), "JPEG", quality=95))
    full = read_image(path, Preprocess(64, mode)).astype(int)
    reduced = read_image(path, Preprocess(64, mode, decode="reduced")).astype(int)
    assert np.abs(full - reduced).mean() < 1


def test_reduced_decoding_is_never_smaller_than_the_image(tmp_path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_image(photo(640, 513), "JPEG"))
    assert decode_image(path, 128).pixels.size == (160, 129)
    assert decode_image(path, 128).extent == (160, 128.25)
    assert decode_image(path, 257).pixels.size == (640, 513)
    assert decode_image(path).pixels.size == (640, 513)
    assert decode_image(path, 128).size == (640, 513)


def test_annotations_are_never_reduced(tmp_path) -> None:
    for stream in ("rgb", "segmentation"):
        (tmp_path / stream).mkdir()
    ids = np.random.default_rng(0).integers(0, 4, (256, 256), dtype=np.uint8)
    (tmp_path / "rgb" / "a.jpg").write_bytes(encode_image(photo(256, 256), "JPEG"))
    (tmp_path / "segmentation" / "a.png").write_bytes(encode_image(ids))
    images = {}
    for decode in ("full", "reduced"):
        images[decode] = open_source(str(tmp_path), Preprocess(32, decode=decode)).load(0).images[0, 1]
    np.testing.assert_array_equal(images["full"], images["reduced"])


def test_the_decode_is_part_of_the_identity_and_the_default_is_not_named() -> None:
    assert "decode" not in Preprocess(8).to_json()
    assert Preprocess(8, decode="reduced").to_json()["decode"] == "reduced"
    for preprocess in (Preprocess(8), Preprocess(8, decode="reduced")):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    with pytest.raises(UserError, match="decode is 'fast'; it must be one of full, reduced"):
        Preprocess(8, decode="fast")


def test_a_turned_photo_of_many_pixels_keeps_its_extent(tmp_path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    path.write_bytes(encode_image(photo(641, 402), "JPEG", exif=exif))
    picture = decode_image(path, 100)
    assert (picture.size, picture.extent) == ((402, 641), (100.5, 160.25))


def test_streams_of_other_names_are_declared(tmp_path) -> None:
    for stream in ("rgb", "rain"):
        (tmp_path / stream).mkdir()
        (tmp_path / stream / "a.png").write_bytes(encode_image(photo()))
    assert open_source(str(tmp_path), small).stream_sets == (("rgb",),)
    (tmp_path / "streams.json").write_text('{"rain": {"kind": "image"}}')
    source = open_source(str(tmp_path), small)
    assert source.stream_sets == (("rgb", "rain"),)
    assert source.load(0).images.shape == (1, 2, 16, 16, 3)


def test_a_folder_as_a_config_and_a_path_that_is_missing(pictures, tmp_path) -> None:
    config = tmp_path / "source.py"
    text = (
        "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict(dict(kind={!r}, path={!r}))\n"
    )
    config.write_text(text.format("folder", str(pictures)))
    source = open_source(str(config), small)
    assert source.describe() == open_source(str(pictures), small).describe()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(4).images, source.load(4).images)
    for kind in sorted(set(KINDS) - {"generated", "coco", "tfds"}):
        config.write_text(text.format(kind, ""))
        with pytest.raises(UserError, match="path: is missing"):
            open_source(str(config), small)
    config.write_text(text.format("photos", "x"))
    with pytest.raises(UserError, match="kind is 'photos'; it must be one of generated, folder"):
        open_source(str(config), small)


def test_a_folder_is_of_the_kind_of_its_first_file(tmp_path) -> None:
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="no member of its tars"):
        open_source(str(tmp_path), small)
    (tmp_path / "a.png").write_bytes(encode_image(photo()))
    source = open_source(str(tmp_path), small)
    assert [(failure.key, failure.reason) for failure in source.skipped] == [("b.tar", "not an image file")]


def test_the_parameters_that_the_documentation_shows_are_known() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(shown) >= len(KINDS) - 1
    kinds = set()
    for code in shown:
        names: dict = {}
        exec(code, names)
        parameters = dict(names["get_config"]().items())
        kinds.add(parameters["kind"])
        unknown = set(parameters.get("derived", ())) - set(DERIVED)
        assert not unknown
        if parameters["kind"] != "generated":
            config = {key: value for key, value in parameters.items() if not key.startswith("derived")}
            with pytest.raises(UserError) as error:  # that its files aren't here, and nothing else
                _open(config.pop("kind"), small, config)
            assert re.search(
                "found nothing there|no such folder|tensorflow-datasets: DatasetNotFound", str(error.value)
            )
    assert kinds == set(KINDS)
