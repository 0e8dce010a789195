"""Arrays on disk."""

import errno
import os

import numpy as np
import pytest

from lvm.common.arrays import create_arrays


def test_arrays_have_their_space_on_disk(tmp_path):
    arrays = create_arrays(tmp_path, {"a": ((64, 2048), np.float32), "b": ((0, 3), "uint16")})
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= arrays["a"].nbytes == 2**19
    arrays["a"][3] = 1
    del arrays
    assert (np.load(tmp_path / "a.npy").sum(1) == 2048 * (np.arange(64) == 3)).all()
    assert np.load(tmp_path / "b.npy").shape == (0, 3)


def test_arrays_beyond_the_disk_name_folder_and_bytes(tmp_path, monkeypatch):
    def allocate(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(OSError, match="No space left on device: 34 bytes are needed for a, b") as error:
        create_arrays(tmp_path, {"a": ((7,), np.float32), "b": ((1, 3), np.uint16)})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))
