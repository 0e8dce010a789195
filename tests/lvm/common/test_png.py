"""PNG encoding is lossless and reproducible."""

import io

import numpy as np
from PIL import Image

from lvm.common.png import encode_png


def test_encode_png_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = encode_png(image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert data == encode_png(image)
