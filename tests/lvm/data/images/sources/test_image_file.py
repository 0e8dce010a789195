"""Image files, good and bad; decoding at reduced size; opening sources by path and config file."""

from __future__ import annotations

import json
import pickle
import re
import tarfile

import numpy as np
import PIL.Image
import pytest

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import KINDS, _open, open_source
from lvm.data.images.sources.image_file import decode_image, read_image
from lvm.data.images.sources.listing import IMAGE_FORMATS, IMAGE_SUFFIXES
from lvm.data.streams.derived import DERIVED
from lvm.inference.prompts import PromptReader
from tests.commands import ROOT
from tests.image_files import BAD_FILES, UNUSUAL_FILES, check_image_files, encode_image, encode_png, photo

small = Preprocess(16)


def reduced(resolution: int) -> Preprocess:
    return Preprocess(resolution, decode="reduced")


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (content, _) in (BAD_FILES | UNUSUAL_FILES).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("decode", ["full", "reduced"])
def test_folder_lists_bad_files_and_reads_unusual_ones(image_folder, decode) -> None:
    check_image_files(open_source(str(image_folder), Preprocess(16, decode=decode)))


def test_unreadable_file_is_a_failure(image_folder) -> None:
    (image_folder / "zz.jpg").symlink_to(image_folder / "nowhere")
    source = open_source(str(image_folder), small)
    scene = source.load(len(source) - 1)
    assert scene.info.key == "zz.jpg"
    assert scene.failures[0].reason.startswith("zz.jpg: cannot be opened: [Errno 2]")


def test_load_is_independent_of_order(image_folder) -> None:
    source = open_source(str(image_folder), small)
    forwards = [source.load(i).images.tobytes() for i in range(len(source))]
    backwards = [source.load(i).images.tobytes() for i in reversed(range(len(source)))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("size", [(255, 257), (1025, 771), (900, 300)])
@pytest.mark.parametrize("mode", ["squash", "center_crop"])
def test_reduced_decoding_is_close_to_full(tmp_path, size, mode) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_image(photo(*size, seed=1), "JPEG", quality=95))
    full = read_image(path, Preprocess(64, mode)).astype(int)
    reduced = read_image(path, Preprocess(64, mode, decode="reduced")).astype(int)
    assert np.abs(full - reduced).mean() < 1


def test_reduced_decoding_keeps_the_minimum_side(tmp_path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_image(photo(640, 513), "JPEG"))
    assert decode_image(path, reduced(128)).pixels.size == (160, 129)
    assert decode_image(path, reduced(128)).extent == (160, 128.25)
    assert decode_image(path, reduced(257)).pixels.size == (640, 513)
    assert decode_image(path).pixels.size == (640, 513)
    assert decode_image(path, reduced(128)).size == (640, 513)


@pytest.mark.parametrize(("bits", "channels"), [(1, ()), (2, ()), (4, ()), (8, ()), (16, ()), (8, (3,)), (16, (3,))])
def test_transparent_color_of_png_is_black(bits, channels) -> None:
    white = 2**bits - 1
    samples = np.full((4, 8, *channels), white, np.int64)
    samples[:, 4:] = white - 1  # of RGB with 16 bits, the low byte alone tells them apart
    png = encode_png(samples, bits, (white,) * samples[0, 0].size)
    image = read_image(lambda: png, Preprocess(8, filter="nearest"))
    assert not image[:, :4].any()
    assert (image[:, 4:] == round(255 * (white - 1) / white)).all()


def test_annotations_are_decoded_in_full(tmp_path) -> None:
    for stream in ("rgb", "segmentation"):
        (tmp_path / stream).mkdir()
    ids = np.random.default_rng(0).integers(0, 4, (256, 256), dtype=np.uint8)
    (tmp_path / "rgb" / "a.jpg").write_bytes(encode_image(photo(256, 256), "JPEG"))
    (tmp_path / "segmentation" / "a.png").write_bytes(encode_image(ids))
    images = {}
    for decode in ("full", "reduced"):
        images[decode] = open_source(str(tmp_path), Preprocess(32, decode=decode)).load(0).images[0, 1]
    np.testing.assert_array_equal(images["full"], images["reduced"])


def test_preprocess_json_omits_default_decode() -> None:
    assert "decode" not in Preprocess(8).to_json()
    assert Preprocess(8, decode="reduced").to_json()["decode"] == "reduced"
    for preprocess in (Preprocess(8), Preprocess(8, decode="reduced")):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    with pytest.raises(UserError, match="decode='fast'"):
        Preprocess(8, decode="fast")


def test_reduced_decoding_turns_the_extent(tmp_path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    path.write_bytes(encode_image(photo(641, 402), "JPEG", exif=exif))
    image = decode_image(path, reduced(100))
    assert (image.size, image.extent) == ((402, 641), (100.5, 160.25))


def test_streams_json_declares_new_streams(tmp_path) -> None:
    for stream in ("rgb", "rain"):
        (tmp_path / stream).mkdir()
        (tmp_path / stream / "a.png").write_bytes(encode_image(photo()))
    assert open_source(str(tmp_path), small).stream_sets == (("rgb",),)
    (tmp_path / "streams.json").write_text('{"rain": {"kind": "image"}}')
    source = open_source(str(tmp_path), small)
    assert source.stream_sets == (("rgb", "rain"),)
    assert source.load(0).images.shape == (1, 2, 16, 16, 3)


def test_config_file_opens_a_folder_and_needs_a_path(image_folder, tmp_path) -> None:
    config = tmp_path / "source.py"
    text = "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict(dict(kind={!r}, path={!r}))\n"
    config.write_text(text.format("folder", str(image_folder)))
    source = open_source(str(config), small)
    assert source.describe() == open_source(str(image_folder), small).describe()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.load(4).images, source.load(4).images)
    for kind in sorted(set(KINDS) - {"generated", "coco", "tfds"}):
        config.write_text(text.format(kind, ""))
        with pytest.raises(UserError, match=rf"{kind}\.path is missing"):
            open_source(str(config), small)
    config.write_text(text.format("photos", "x"))
    with pytest.raises(UserError, match="kind is 'photos'; it must be one of generated, folder"):
        open_source(str(config), small)


def test_folder_has_the_kind_of_its_first_file(tmp_path) -> None:
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"b\.tar"):
        open_source(str(tmp_path), small)
    (tmp_path / "a.png").write_bytes(encode_image(photo()))
    source = open_source(str(tmp_path), small)
    assert [(failure.key, failure.reason) for failure in source.skipped] == [("b.tar", "not an image file")]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_an_image_in_folder_tar_and_prompt(tmp_path, suffix) -> None:
    format = next(format for format, suffixes in IMAGE_FORMATS.items() if suffix in suffixes)
    content = encode_image(photo(), format)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}{suffix.upper()}").write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, ".")
    images = open_source(str(folder), small).load(0).images[:, 0]
    source = open_source(str(tmp_path / "a.tar"), small)
    assert len(source) == 2
    np.testing.assert_array_equal(source.load(0).images[:, 0], images)
    reader = PromptReader(lambda path: read_image(path, small), small)
    query = str(folder / f"a{suffix.upper()}")
    for prompt in (reader.read_sequence([str(folder)]), reader.read_pairs([f"{folder}:{folder}"], query)):
        assert (prompt.images == images).all()


def test_documented_parameters_are_valid() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= len(KINDS) - 1
    kinds = set()
    for code in examples:
        names: dict = {}
        exec(code, names)
        parameters = dict(names["get_config"]().items())
        kinds.add(parameters["kind"])
        unknown = set(parameters.get("derived", ())) - set(DERIVED)
        assert not unknown
        if parameters["kind"] != "generated":
            config = {key: value for key, value in parameters.items() if not key.startswith("derived")}
            with pytest.raises(UserError) as error:  # only because its files aren't here
                _open(config.pop("kind"), small, config)
            assert re.search(
                "found nothing there|no such folder|tensorflow-datasets: DatasetNotFound", str(error.value)
            )
    assert kinds == set(KINDS)
