"""Tar source: keys, streams, damaged archives, and the index file."""

from __future__ import annotations

import io
import pathlib
import pickle
import tarfile
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.images.sources import tar as tar_source
from lvm.data.streams.codecs import Palette
from tests.image_files import BAD_FILES, UNUSUAL_FILES, check_image_files, encode_image, photo

small = Preprocess(16)
RGB = encode_image(photo(), "JPEG")
IDS = encode_image(np.full((32, 48), 3, np.uint8))


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    """Writes a tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def failures(source) -> dict[str, str]:
    return {failure.key: failure.reason for failure in source.skipped}


def test_hidden_members_are_not_used(tmp_path) -> None:
    names = ["./7.jpg", "./._7.jpg", ".cache/8.jpg", "a/.b/9.jpg"]
    source = open_source(str(write_tar(tmp_path / "a.tar", [(name, RGB) for name in names])), small)
    assert [source.info(i).key for i in range(len(source))] == ["a.tar/7"]
    assert sum(int(failure.reason.split()[0]) for failure in source.skipped) == 3


def test_suffixes_of_streams_may_have_dots_and_capitals(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [("7.JPG", RGB), ("7.Mask.PNG", IDS)])
    source = open_source(str(tmp_path / "a.tar"), small, {"streams": {"rgb": ".png; .JPG", "segmentation": "MASK.png"}})
    assert source.info(0).streams == ("rgb", "segmentation")


def test_members_of_one_key_are_one_scene(tmp_path) -> None:
    members = [
        ("a/7.jpg", RGB),
        ("a/7.segmentation.png", IDS),
        ("a/7.cls", b"cat\n"),
        ("8.x.jpg", RGB),
        ("8.jpg", RGB),
    ]
    for name in ("part-10.tar", "part-2.tar"):
        write_tar(tmp_path / name, members)
    source = open_source(str(tmp_path), small)
    infos = [source.info(i) for i in range(len(source))]
    assert [i.key for i in infos] == ["part-2.tar/a/7", "part-2.tar/8", "part-10.tar/a/7", "part-10.tar/8"]
    assert [i.group for i in infos] == [i.key for i in infos]
    assert [i.class_name for i in infos] == ["cat", "", "cat", ""]
    assert source.classes == ("cat",)
    assert source.stream_sets == (("rgb",), ("rgb", "segmentation"))
    scene = source.load(0)
    assert scene.images.shape == (1, 2, 16, 16, 3)
    assert (source.streams["segmentation"].parse(scene.images[0, 1]) == 3).all()
    assert failures(source) == {
        "part-2.tar": "1 members, .x.jpg: of no stream",
        "part-10.tar": "1 members, .x.jpg: of no stream",
    }


def test_streams_parameter_sets_suffixes(tmp_path) -> None:
    write_tar(
        tmp_path / "t" / "a.tar",
        [("1.photo.webp", encode_image(photo(), "WEBP")), ("1.ids.png", IDS), ("1.txt", b"x")],
    )
    (tmp_path / "t" / "classes.json").write_text('{"3": "cat"}')
    config = tmp_path / "source.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(dict(kind='tar', path='{tmp_path}/t/*.tar', derived=('gray',),\n"
        "        streams=dict(rgb='photo.jpg;photo.webp', segmentation='ids.png')))\n"
    )
    source = open_source(str(config), small)
    assert source.info(0).streams == ("rgb", "segmentation", "gray")
    assert source.streams["segmentation"] == Palette(("background", "", "", "cat"), background=0)
    with pytest.raises(UserError, match=r"tar\.streams: \['depth'\]"):
        open_source(str(config), small, {"streams": {"depth": "png"}})


def test_stream_of_no_member_and_repeated_suffix_are_named(tmp_path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", RGB), ("1.depth.png", IDS)])
    source = open_source(str(path), small, {"streams": {"rgb": "jpg", "depth": "depht.png"}})
    assert failures(source)["depth"] == "no scene has this stream: nothing in 'depht.png'"
    with pytest.raises(UserError, match=r"tar\.streams: .* repeat 'png'"):
        open_source(str(path), small, {"streams": {"rgb": "jpg;png", "depth": "png"}})


def test_tar_lists_bad_files_and_reads_unusual_ones(tmp_path) -> None:
    files = {f"a.tar/{name.split('.')[0]}": name for name in BAD_FILES | UNUSUAL_FILES}
    members = [(name, content) for name, (content, _) in (BAD_FILES | UNUSUAL_FILES).items()]
    check_image_files(open_source(str(write_tar(tmp_path / "a.tar", members)), small), files.__getitem__)


def test_unsafe_duplicate_and_special_members_are_skipped(tmp_path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("../evil.jpg", RGB),
            ("/abs.jpg", RGB),
            ("1.jpg", RGB),
            ("1.png", RGB),
            ("1.jpg", b""),
            ("2.depth.png", IDS),
        ],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source(str(path), small)
    assert [source.info(i).key for i in range(len(source))] == ["a.tar/1"]
    assert source.load(0).failures == ()  # the first of the duplicates
    assert failures(source) == {
        "a.tar/../evil.jpg": "its name leaves the archive",
        "a.tar//abs.jpg": "its name leaves the archive",
        "a.tar/1.png": "its key and stream are those of 1.jpg, which is used",
        "a.tar/1.jpg": "its key and stream are those of 1.jpg, which is used",
        "a.tar/2": "has depth but no rgb",
        "a.tar/3.jpg": "not a plain file",
    }
    assert not list(tmp_path.parent.glob("evil*"))


NAMES = st.text("ab./\\jpgncls ", min_size=1, max_size=12).filter(lambda name: not name.endswith("/"))


@given(st.lists(NAMES, max_size=12))
def test_every_member_is_used_or_skipped(names) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(pathlib.Path(folder) / "a.tar", [("first.jpg", RGB), *((name, RGB) for name in names)])
        source = open_source(str(path), small)
        used = sum(len(source.info(i).streams) for i in range(len(source)))
        used += sum(bool(source.info(i).class_name) for i in range(len(source)))
        counted = [int(f.reason.split()[0]) for f in source.skipped if "of no stream" in f.reason]
        listed = [f for f in source.skipped if "of no stream" not in f.reason]
        assert used + sum(counted) <= len(names) + 1 <= used + sum(counted) + len(listed) * 2
        assert all(len(source.load(i).failures) == 0 for i in range(len(source)))


@pytest.mark.parametrize("where", ["data", "header", "end"])
def test_truncated_tar_is_read_to_its_end(tmp_path, where) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", RGB) for i in range(4)])
    block = 512 + (len(RGB) + 511) // 512 * 512
    length = {"data": 2 * block + 700, "header": 2 * block + 100, "end": 2 * block}[where]
    path.write_bytes(path.read_bytes()[:length])
    write_tar(tmp_path / "b.tar", [("9.jpg", RGB)])
    source = open_source(str(tmp_path), small)
    assert [source.info(i).key for i in range(len(source))] == ["a.tar/0", "a.tar/1", "b.tar/9"]
    assert len(failures(source)) >= 1
    assert all(key.startswith("a.tar") for key in failures(source))


def test_damaged_header_is_listed(tmp_path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", RGB) for i in range(4)])
    block = 512 + (len(RGB) + 511) // 512 * 512
    data = bytearray(path.read_bytes())
    data[block + 5] ^= 255
    path.write_bytes(data)
    source = open_source(str(path), small)
    assert len(source) == 1
    assert failures(source) == {"a.tar": f"damaged: no header at byte {block}; what follows is not used"}


def test_members_after_zeros_are_read(tmp_path) -> None:
    parts = [write_tar(tmp_path / "parts" / f"{i}.tar", [(f"{i}.jpg", RGB), (f"{i}b.jpg", RGB)]) for i in range(3)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    source = open_source(str(joined), small)
    names = [name for i in range(3) for name in (f"{i}", f"{i}b")]
    assert [source.info(i).key for i in range(len(source))] == [f"joined.tar/{name}" for name in names]
    assert all(source.load(i).failures == () for i in range(len(source)))
    end = 2 * (512 + (len(RGB) + 511) // 512 * 512)
    where = f"zeros from byte {end} to {parts[0].stat().st_size}"
    assert failures(source) == {"joined.tar": f"{where}: tars were joined, or it has a hole"}


@pytest.mark.parametrize(("whole", "keys"), [(True, ["0", "2"]), (False, ["0"])])
def test_hole_in_a_tar_is_listed(tmp_path, whole, keys) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", RGB) for i in range(3)])
    block = 512 + (len(RGB) + 511) // 512 * 512
    data = bytearray(path.read_bytes())
    data[block : 2 * block if whole else block + 512] = bytes(block if whole else 512)
    path.write_bytes(data)
    source = open_source(str(path), small)
    assert [source.info(i).key for i in range(len(source))] == [f"a.tar/{key}" for key in keys]
    reason = f"zeros from byte {block} to {2 * block if whole else block + 512}: tars were joined, or it has a hole"
    assert any(failure.reason.startswith(reason) for failure in source.skipped)
    assert whole or any("no header" in failure.reason for failure in source.skipped)


@pytest.mark.parametrize("size", [-(1 << 20), 1 << 62, 1 << 80])
def test_impossible_member_size_ends_the_listing(tmp_path, size) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", RGB), ("1.jpg", RGB)])
    block, data = 512 + (len(RGB) + 511) // 512 * 512, path.read_bytes()
    header = tarfile.TarInfo("1.jpg")
    header.size = size
    path.write_bytes(data[:block] + header.tobuf(tarfile.GNU_FORMAT) + data[block + 512 :])
    source = open_source(str(path), small)
    assert [source.info(i).key for i in range(len(source))] == ["a.tar/0"]
    assert source.skipped


def test_missing_tar_and_non_utf8_name_are_skipped(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", encode_image(photo())), ("caf\udce9.png", encode_image(photo()))])
    (tmp_path / "b.tar").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path), small)
    assert len(source) == 1
    assert failures(source) == {
        "a.tar/caf\\udce9.png": "its name is not UTF-8",
        "b.tar": "can't be read: No such file or directory",
    }


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_tar_is_rejected(tmp_path, name) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    for spec in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name}.* is compressed.*unpack it") as error:
            open_source(str(spec), small)
        assert "\n" not in str(error.value)


def test_compressed_tar_beside_others_is_listed(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", RGB)])
    (tmp_path / "b.tar.zst").write_bytes(b"x")
    source = open_source(str(tmp_path), small)
    assert "is compressed" in failures(source)["b.tar.zst"]


def test_tar_without_images_is_rejected(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no usable rgb member.*1 members, \.txt"):
        open_source(str(write_tar(tmp_path / "b" / "b.tar", [("1.txt", b"x")])), small)


def test_index_is_used_until_the_tar_changes(tmp_path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", RGB)])
    first = open_source(str(path), small).describe()
    with monkeypatch.context() as patch:
        patch.setattr(tar_source, "_scan", lambda *_: pytest.fail("the index was not used"))
        assert open_source(str(path), small).describe() == first
    write_tar(path, [("1.jpg", RGB), ("2.jpg", RGB)])
    again = open_source(str(path), small)
    assert len(again) == 2
    assert again.describe() != first
    (tmp_path / "a.tar.index.json").write_text("{")
    assert len(open_source(str(path), small)) == 2
    assert len(open_source(str(tmp_path), small)) == 2  # the index is no file of the source


def test_tar_source_pickles_and_is_location_independent(tmp_path) -> None:
    for folder in ("a", "b"):
        write_tar(tmp_path / folder / "a.tar", [("1.jpg", RGB)])
    first, second = (open_source(str(tmp_path / folder), small) for folder in ("a", "b"))
    assert first.describe() == second.describe()
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(copy.load(0).images, first.load(0).images)
    with pytest.raises(IndexError):
        first.info(1)
