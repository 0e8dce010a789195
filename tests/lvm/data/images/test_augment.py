"""Augmentation: windows and flips, shared by a scene's frames and streams."""

import numpy as np

from lvm.data.images.augment import Augment
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.streams.codecs import Image, Normals


def test_copies_share_a_window_and_are_flipped_by_their_codecs():
    augment, codecs = Augment(12, Preprocess(16)), {"rgb": Image(), "normals": Normals()}
    side = augment.source_preprocess.resolution
    row, column = np.indices((side, side))
    normals = np.random.default_rng(0).normal(size=(2, side, side, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    images = np.stack([[np.stack([row, column, row], -1).astype(np.uint8), Normals().render(x)] for x in normals])
    scene = SceneImages(SceneInfo("key", "group", "", 2, ("rgb", "normals")), images)
    flips = []
    for copy in augment(scene, codecs):
        rows, columns = copy.images[0, 0, :, :, 0].astype(int), copy.images[0, 0, :, :, 1].astype(int)
        flips.append(bool(columns[0, 0] > columns[0, -1]))
        expected = normals[:, rows, columns] * ([-1, 1, 1] if flips[-1] else [1, 1, 1])  # x points to the right
        for frame in range(2):
            np.testing.assert_array_equal(copy.images[frame, 1], Normals().render(expected[frame]))
            np.testing.assert_array_equal(copy.images[frame, 0], copy.images[0, 0])
    assert set(flips) == {False, True}
