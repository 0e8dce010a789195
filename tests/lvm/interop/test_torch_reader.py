"""Files of `torch.save`, read without torch: tensor contents, and hostile pickles that must not execute code."""

import collections
import io
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest

from lvm.common.errors import UserError
from lvm.interop import tensors
from lvm.interop.torch_reader import read_state_dict, read_torch


class Call:
    """Pickled as a call of the global `name`, as torch pickles tensors."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Storage:
    def __init__(self, dtype, key, size):
        self.dtype, self.key, self.size = dtype, key, size


class Writer(pickle._Pickler):
    """Pickler that writes what `torch.save` writes, and arbitrary globals and calls."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global(f"torch {obj.dtype}Storage"), obj.key, "cpu", obj.size)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + obj.name.replace(" ", "\n").encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(Global(obj.name))
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


class Global:
    def __init__(self, name):
        self.name = name


def tensor(dtype, key, size, offset, shape, strides):
    hooks = Call("collections OrderedDict")
    storage = Storage(dtype, key, size)
    return Call("torch._utils _rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


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


def test_read_tensor_follows_strides(tmp_path):
    content = {
        "plain": tensor("Float", "0", 24, 0, (2, 3, 4), (12, 4, 1)),
        "transposed": tensor("Float", "0", 24, 0, (4, 3, 2), (1, 4, 12)),
        "sliced": tensor("Float", "0", 24, 5, (2, 2), (12, 2)),
        "scalar": tensor("Float", "0", 24, 23, (), ()),
        "empty": tensor("Float", "0", 24, 24, (0, 3), (3, 1)),
        "repeated": tensor("Float", "0", 24, 7, (5,), (0,)),
    }
    loaded = read_state_dict(save(tmp_path / "x.bin", content, [NUMBERS]))
    plain = NUMBERS.reshape(2, 3, 4)
    expected = {
        "plain": plain,
        "transposed": plain.transpose(2, 1, 0),
        "sliced": np.array([[5, 7], [17, 19]]),
        "scalar": np.array(23),
        "empty": np.zeros((0, 3)),
        "repeated": np.full(5, 7),
    }
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        data = loaded[name].read()
        assert (loaded[name].shape, loaded[name].dtype) == (array.shape, np.float32)
        assert data.flags.c_contiguous
        assert data.flags.owndata
        np.testing.assert_array_equal(data, array)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("Double", np.float64), ("Float", np.float32), ("Half", np.float16), ("BFloat16", tensors.BFLOAT16),
        ("Long", np.int64), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8),
        ("Bool", np.bool_),
    ],
)  # fmt: skip
def test_read_tensor_dtypes(storage, dtype, tmp_path):
    array = np.array([0, 1, 1, 0, 1, 0]).astype(dtype)
    content = {"x": tensor(storage, "0", 6, 0, (2, 3), (3, 1))}
    (loaded,) = read_state_dict(save(tmp_path / "x.bin", content, [array])).values()
    assert loaded.dtype == loaded.read().dtype == dtype
    np.testing.assert_array_equal(loaded.read(), array.reshape(2, 3))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_read_torch_keeps_plain_containers(protocol, tmp_path):
    plain = {
        "list": [1, -5, 2**40, 2.5, True, None],
        "tuple": ((), (1,), (1, 2, 3, 4)),
        "text": "ä" * 300,
        3: {},
    }
    assert read_torch(save(tmp_path / "x.bin", plain, protocol=protocol)) == plain


def test_read_torch_ordered_dict_parameter_and_metadata(tmp_path):
    weight = tensor("Float", "0", 24, 0, (24,), (1,))
    parameter = Call("torch._utils _rebuild_parameter", weight, True, Call("collections OrderedDict"))
    pairs = Call("collections OrderedDict", [["a", weight], ["b", parameter]])
    loaded = read_state_dict(save(tmp_path / "x.bin", {"state_dict": pairs, "epoch": 3}, [NUMBERS]))
    assert list(loaded) == ["a", "b"]
    np.testing.assert_array_equal(loaded["b"].read(), NUMBERS)
    # A module's state dict: an OrderedDict with the attribute `_metadata`.
    raw = b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadata}sb."
    assert read_torch(save(tmp_path / "y.bin", None, raw=raw)) == {}


class Attack:
    """Creates a file when unpickled by the standard library."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attacks(marker):
    command = f"touch {marker}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    yield "reduce", pickle.dumps(Attack(marker), 2)
    yield "newer reduce", pickle.dumps(Attack(marker), 4)
    yield "nested", pickle.dumps({"a": [1, ({"b": Attack(marker)},)]}, 2)
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
    yield (
        "build of an allowed global",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00name" + text + b"sb.",
    )
    yield "new object of an allowed global", b"\x80\x02ccollections\nOrderedDict\n)\x81."


def test_read_torch_executes_no_code(tmp_path):
    marker = tmp_path / "executed"
    assert dict(attacks(marker))["reduce"]
    for name, raw in attacks(marker):
        path = save(tmp_path / "x.bin", None, raw=raw)
        with pytest.raises(UserError, match=r"x\.bin: (refused|damaged)") as caught:
            read_torch(path)
        assert not marker.exists(), name
        if b"os\nsystem" in raw or name.endswith("reduce"):
            assert any(word in str(caught.value) for word in ("os.system", "posix.system")), name
    pickle.loads(pickle.dumps(Attack(marker), 2))
    assert marker.exists()  # the attack works without the restriction


@pytest.mark.parametrize("build", [b"}X\x05\x00\x00\x00shape)sb", b"N}X\x05\x00\x00\x00shape)s\x86b"])
def test_read_torch_refuses_attributes_of_tensors(build, tmp_path):
    stream = io.BytesIO()
    Writer(stream, 2).dump(tensor("Float", "0", 24, 0, (24,), (1,)))
    raw = stream.getvalue()[:-1] + build + b"."
    with pytest.raises(UserError, match=r"x\.bin: refused.*Tensor"):
        read_torch(save(tmp_path / "x.bin", None, [NUMBERS], raw=raw))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo of 2^32 entries
        b"p9999999999\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes, a terabyte of them
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x01s.",  # a key whose hash overflows the C stack
    ],
    ids=["memo", "text memo", "bytes", "bytearray", "frame", "nesting"],
)
def test_read_torch_refuses_size_bombs(raw, tmp_path):
    import tracemalloc

    path = save(tmp_path / "x.bin", None, raw=raw)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.bin: damaged"):
        read_torch(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**8


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Call("torch Size", [1]), "torch.Size"),
        (Call("numpy.core.multiarray _reconstruct"), "numpy.core.multiarray._reconstruct"),
        ({"a": Global("torch float32")}, "torch.float32"),
        (Call("ml_collections.config_dict.config_dict ConfigDict"), "ConfigDict"),
        (Call("builtins eval", "1"), "builtins.eval"),
        ({1, 2}, "set"),
        (b"bytes", "_codecs"),
        (Call("collections OrderedDict", 3), "collections.OrderedDict"),
    ],
)
def test_read_torch_refuses_other_names(content, name, tmp_path):
    with pytest.raises(UserError, match=rf"x\.bin: refused.*{re.escape(name)}"):
        read_torch(save(tmp_path / "x.bin", content))


@pytest.mark.parametrize("end", [b"K\x01s.", b"K\x01u.", b"\x8f(h\x31\x90."])
def test_read_torch_never_hashes_tuples(end, tmp_path):
    """A tuple of the same tuple twice, 48 deep, takes weeks to hash."""
    doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(48))
    start = b"}(" if end.endswith(b"u.") else b"}"
    raw = b"\x80\x04" + start + b")q\x00" + doubled + end
    with pytest.raises(UserError, match=r"x\.bin: refused.*(tuple|set)"):
        read_torch(save(tmp_path / "x.bin", None, raw=raw))


@pytest.mark.parametrize(
    ("content", "storages"),
    [
        (tensor("Float", "0", 24, 0, (5, 5), (5, 1)), [NUMBERS]),  # beyond the storage
        (tensor("Float", "0", 24, 1, (24,), (1,)), [NUMBERS]),
        (tensor("Float", "0", 24, -1, (2,), (1,)), [NUMBERS]),
        (tensor("Float", "0", 24, 23, (2,), (-1,)), [NUMBERS]),
        (tensor("Float", "0", 25, 0, (24,), (1,)), [NUMBERS]),  # a truncated storage
        (tensor("Float", "1", 24, 0, (24,), (1,)), [NUMBERS]),  # a missing storage
        (tensor("Float", "0", 24, 0, (4, 6), (6,)), [NUMBERS]),
    ],
)
def test_read_torch_rejects_tensors_outside_their_storage(content, storages, tmp_path):
    with pytest.raises(UserError, match=r"x\.bin: damaged"):
        read_torch(save(tmp_path / "x.bin", content, storages))


@pytest.mark.parametrize("raw", [b"\x80\x02.", b"\x80\x02}", b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02a.", b"\x99"])
def test_read_torch_rejects_malformed_pickles(raw, tmp_path):
    with pytest.raises(UserError, match=r"x\.bin: (damaged|refused)"):
        read_torch(save(tmp_path / "x.bin", None, raw=raw))


def test_read_torch_rejects_other_files(tmp_path):
    older = tmp_path / "older.pth"
    older.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(UserError, match=r"older\.pth: not a zip file.*torch\.save"):
        read_torch(older)
    with pytest.raises(UserError, match="no such file"):
        read_torch(tmp_path / "missing")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"other\.zip: .*data\.pkl"):
        read_torch(tmp_path / "other.zip")
    with pytest.raises(UserError, match=r"x\.bin: .* is compressed"):
        read_torch(save(tmp_path / "x.bin", {"a": "b" * 99}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=r"x\.bin: .*epoch"):
        read_state_dict(save(tmp_path / "x.bin", {"epoch": 3}))
    with pytest.raises(UserError, match=r"x\.bin: .*list"):
        read_state_dict(save(tmp_path / "x.bin", [1]))


def test_read_tensor_copies_only_that_tensor(tmp_path):
    import tracemalloc

    large = np.zeros(8_000_000, np.float32)
    content = {"large": tensor("Float", "0", large.size, 0, (large.size,), (1,))}
    content["small"] = tensor("Float", "1", 24, 0, (24,), (1,))
    path = save(tmp_path / "x.bin", content, [large, NUMBERS])
    tracemalloc.start()
    loaded = read_state_dict(path)
    np.testing.assert_array_equal(loaded["small"].read(), NUMBERS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < large.nbytes / 10


def test_read_safetensors_shapes_dtypes_and_data(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {"a": NUMBERS.reshape(4, 6), "b": NUMBERS.astype(tensors.BFLOAT16), "c": np.arange(3)}
    tensors.write_safetensors(tmp_path / "x.safetensors", arrays)
    loaded = tensors.read_safetensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert (loaded[name].shape, loaded[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(loaded[name].read(), array)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"x\.safetensors: not a readable safetensors file"):
        tensors.read_safetensors(tmp_path / "x.safetensors")


def test_check_finite_takes_few_passes(monkeypatch):
    counted, count_nonzero = [], np.count_nonzero
    monkeypatch.setattr(np, "count_nonzero", lambda bits: counted.append(bits.size) or count_nonzero(bits))
    tensors.check_finite(np.zeros(2**18 + 1, np.float32), "x")
    assert counted == [2**18, 1]  # 1 MiB at once: larger arrays leave the cache, smaller ones cost a call each


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_state_dict_of_torch_save(protocol, tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    x = torch.arange(24.0).reshape(2, 3, 4)
    state = collections.OrderedDict(layer.state_dict(), transposed=x.transpose(0, 2), step=x[0, 1:, ::2].half())
    state |= {"parameter": torch.nn.Parameter(x), "wide": x[0, 0].expand(5, 4), "brain": x.bfloat16()}
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
    loaded = read_state_dict(tmp_path / "x.bin")
    assert list(loaded) == list(state)
    for name, value in state.items():
        array = value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
        np.testing.assert_array_equal(loaded[name].read().astype(array.dtype), array)
    torch.save(layer, tmp_path / "whole.bin", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_torch(tmp_path / "whole.bin")
    torch.save(layer.state_dict(), tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"older\.bin: not a zip file"):
        read_torch(tmp_path / "older.bin")
