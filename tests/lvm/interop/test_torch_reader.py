"""Files of torch.save, read without torch: tensors as they are, and nothing that a pickle could call."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.interop import tensors
from lvm.interop.torch_reader import read_state_dict, read_torch


class Name:
    """Pickled as a global of that name, called with these arguments: what torch does without our having torch."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Storage:
    def __init__(self, kind, key, size):
        self.kind, self.key, self.size = kind, key, size


class Writer(pickle._Pickler):
    """Writes what torch.save would, and whatever else a hand would put there."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global(f"torch {obj.kind}Storage"), obj.key, "cpu", obj.size)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + obj.name.replace(" ", "\n").encode() + b"\n")
        elif isinstance(obj, Name):
            self.save(Global(obj.name))
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


class Global:
    def __init__(self, name):
        self.name = name


def tensor(kind, key, size, offset, shape, strides):
    hooks = Name("collections OrderedDict")
    storage = Storage(kind, key, size)
    return Name("torch._utils _rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def save(path, content, storages=(), protocol=2, compression=zipfile.ZIP_STORED, raw=None):
    stream = io.BytesIO()
    Writer(stream, protocol).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", raw or stream.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
    return path


NUMBERS = np.arange(24, dtype=np.float32)


def test_tensors_lie_as_their_strides_say(tmp_path):
    content = {
        "plain": tensor("Float", "0", 24, 0, (2, 3, 4), (12, 4, 1)),
        "turned": tensor("Float", "0", 24, 0, (4, 3, 2), (1, 4, 12)),
        "part": tensor("Float", "0", 24, 5, (2, 2), (12, 2)),
        "one": tensor("Float", "0", 24, 23, (), ()),
        "none": tensor("Float", "0", 24, 24, (0, 3), (3, 1)),
        "repeated": tensor("Float", "0", 24, 7, (5,), (0,)),
    }
    found = read_state_dict(save(tmp_path / "x.bin", content, [NUMBERS]))
    whole = NUMBERS.reshape(2, 3, 4)
    wanted = {
        "plain": whole,
        "turned": whole.transpose(2, 1, 0),
        "part": np.array([[5, 7], [17, 19]]),
        "one": np.array(23),
        "none": np.zeros((0, 3)),
        "repeated": np.full(5, 7),
    }
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        read = found[name].read()
        assert (found[name].shape, found[name].dtype) == (array.shape, np.float32)
        assert read.flags.c_contiguous
        assert read.flags.owndata
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Double", np.float64), ("Float", np.float32), ("Half", np.float16), ("BFloat16", tensors.BFLOAT16),
        ("Long", np.int64), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8),
        ("Bool", np.bool_),
    ],
)  # fmt: skip
def test_every_dtype(kind, dtype, tmp_path):
    array = np.array([0, 1, 1, 0, 1, 0]).astype(dtype)
    content = {"x": tensor(kind, "0", 6, 0, (2, 3), (3, 1))}
    (found,) = read_state_dict(save(tmp_path / "x.bin", content, [array])).values()
    assert found.dtype == found.read().dtype == dtype
    np.testing.assert_array_equal(found.read(), array.reshape(2, 3))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_containers_come_through(protocol, tmp_path):
    plain = {
        "list": [1, -5, 2**40, 2.5, True, None],
        "tuple": ((), (1,), (1, 2, 3, 4)),
        "text": "ä" * 300,
        3: {},
    }
    assert read_torch(save(tmp_path / "x.bin", plain, protocol=protocol)) == plain


def test_ordered_dicts_parameters_and_metadata(tmp_path):
    weight = tensor("Float", "0", 24, 0, (24,), (1,))
    parameter = Name("torch._utils _rebuild_parameter", weight, True, Name("collections OrderedDict"))
    pairs = Name("collections OrderedDict", [["a", weight], ["b", parameter]])
    found = read_state_dict(save(tmp_path / "x.bin", {"state_dict": pairs, "epoch": 3}, [NUMBERS]))
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"].read(), NUMBERS)
    # As a module's state dict is written: an OrderedDict with its `_metadata` as state.
    raw = b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadata}sb."
    assert read_torch(save(tmp_path / "y.bin", None, raw=raw)) == {}


class Attack:
    """Would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attacks(mark):
    command = f"touch {mark}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    yield "reduce", pickle.dumps(Attack(mark), 2)
    yield "newer reduce", pickle.dumps(Attack(mark), 4)
    yield "nested", pickle.dumps({"a": [1, ({"b": Attack(mark)},)]}, 2)
    yield (
        "as a key",
        pickle.dumps({("k",): 1}, 2).replace(b"X\x01\x00\x00\x00k", b"cos\nsystem\n" + text + b"\x85R"),
    )
    yield "instance", b"(" + text + b"ios\nsystem\n."
    yield "object", b"(cos\nsystem\n" + text + b"o."
    yield "new object", b"\x80\x02cos\nsystem\n" + text + b"\x85\x81."
    yield "build", b"\x80\x02ccollections\nOrderedDict\n}X\x05\x00\x00\x00clear" + text + b"sb."
    yield (
        "build with slots",
        b"\x80\x02ccollections\nOrderedDict\n)R}}X\x05\x00\x00\x00clear" + text + b"s\x86b.",
    )
    yield (
        "an admitted name's attribute",
        b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.fromkeys.__call\x93)R.",
    )
    yield "a call of what was read", b"\x80\x02" + text + text + b"\x85R."
    yield "extension", b"\x80\x02\x82\x01."
    yield "persistent", b"\x80\x02cos\nsystem\n" + text + b"\x86Q."


def test_nothing_that_a_pickle_calls_is_run(tmp_path):
    mark = tmp_path / "run"
    assert dict(attacks(mark))["reduce"]
    for name, raw in attacks(mark):
        path = save(tmp_path / "x.bin", None, raw=raw)
        with pytest.raises(UserError, match=r"x\.bin: (refused|damaged)") as caught:
            read_torch(path)
        assert not mark.exists(), name
        if b"os\nsystem" in raw or name.endswith("reduce"):
            assert any(word in str(caught.value) for word in ("os.system", "posix.system", "opcode")), name
    pickle.loads(pickle.dumps(Attack(mark), 2))
    assert mark.exists()  # the attack is one


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Name("torch Size", [1]), "torch.Size"),
        (Name("numpy.core.multiarray _reconstruct"), "numpy.core.multiarray._reconstruct"),
        ({"a": Global("torch float32")}, "torch.float32"),
        (Name("ml_collections.config_dict.config_dict ConfigDict"), "ConfigDict"),
        (Name("builtins eval", "1"), "builtins.eval"),
        ({1, 2}, "opcode|set"),
        (b"bytes", "opcode|_codecs"),
        (Name("collections OrderedDict", 3), "a call of collections.OrderedDict"),
    ],
)
def test_what_is_no_tensor_or_container_is_refused_by_name(content, named, tmp_path):
    with pytest.raises(UserError, match=f"refused.*({named}).*nothing of it was run"):
        read_torch(save(tmp_path / "x.bin", content))


@pytest.mark.parametrize(
    ("content", "storages"),
    [
        (tensor("Float", "0", 24, 0, (5, 5), (5, 1)), [NUMBERS]),  # beyond the storage
        (tensor("Float", "0", 24, 1, (24,), (1,)), [NUMBERS]),
        (tensor("Float", "0", 24, -1, (2,), (1,)), [NUMBERS]),
        (tensor("Float", "0", 24, 23, (2,), (-1,)), [NUMBERS]),
        (tensor("Float", "0", 25, 0, (24,), (1,)), [NUMBERS]),  # a storage cut short
        (tensor("Float", "1", 24, 0, (24,), (1,)), [NUMBERS]),  # a storage that isn't there
        (tensor("Float", "0", 24, 0, (4, 6), (6,)), [NUMBERS]),
    ],
)
def test_tensors_outside_of_their_storage_are_damage(content, storages, tmp_path):
    with pytest.raises(UserError, match=r"x\.bin: damaged"):
        read_torch(save(tmp_path / "x.bin", content, storages))


@pytest.mark.parametrize(
    "raw", [b"\x80\x02.", b"\x80\x02}", b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02a.", b"\x99"]
)
def test_pickles_that_are_cut_or_senseless_are_damage(raw, tmp_path):
    with pytest.raises(UserError, match=r"x\.bin: (damaged|refused)"):
        read_torch(save(tmp_path / "x.bin", None, raw=raw))


def test_other_files_are_refused_with_what_to_do(tmp_path):
    older = tmp_path / "older.pth"
    older.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(UserError, match=r"older\.pth: not a zip file.*save it again: torch\.save"):
        read_torch(older)
    with pytest.raises(UserError, match="no such file"):
        read_torch(tmp_path / "missing")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"without a data\.pkl"):
        read_torch(tmp_path / "other.zip")
    with pytest.raises(UserError, match="is compressed"):
        read_torch(save(tmp_path / "x.bin", {"a": "b" * 99}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="epoch: no tensors; expected a dict of tensors"):
        read_state_dict(save(tmp_path / "x.bin", {"epoch": 3}))
    with pytest.raises(UserError, match="holds a list"):
        read_state_dict(save(tmp_path / "x.bin", [1]))


def test_reading_one_tensor_of_a_large_file_copies_that_one(tmp_path):
    import tracemalloc

    large = np.zeros(8_000_000, np.float32)
    content = {"large": tensor("Float", "0", large.size, 0, (large.size,), (1,))}
    content["small"] = tensor("Float", "1", 24, 0, (24,), (1,))
    path = save(tmp_path / "x.bin", content, [large, NUMBERS])
    tracemalloc.start()
    found = read_state_dict(path)
    np.testing.assert_array_equal(found["small"].read(), NUMBERS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < large.nbytes / 10


def test_safetensors_are_read_lazily_with_their_dtypes(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {"a": NUMBERS.reshape(4, 6), "b": NUMBERS.astype(tensors.BFLOAT16), "c": np.arange(3)}
    tensors.write_safetensors(tmp_path / "x.safetensors", arrays)
    found = tensors.read_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name].read(), array)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="not a safetensors file"):
        tensors.read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes(protocol, tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    x = torch.arange(24.0).reshape(2, 3, 4)
    state = collections.OrderedDict(layer.state_dict(), turned=x.transpose(0, 2), step=x[0, 1:, ::2].half())
    state |= {"parameter": torch.nn.Parameter(x), "wide": x[0, 0].expand(5, 4), "brain": x.bfloat16()}
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_state_dict(tmp_path / "x.bin")
    assert list(found) == list(state)
    for name, value in state.items():
        array = value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
        np.testing.assert_array_equal(found[name].read().astype(array.dtype), array)
    torch.save(layer, tmp_path / "whole.bin", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_torch(tmp_path / "whole.bin")
    torch.save(layer.state_dict(), tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip file"):
        read_torch(tmp_path / "older.bin")
