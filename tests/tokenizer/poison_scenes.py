"""Source of random images, some of which end, hang or bloat their decoder. Worker processes import it, without JAX."""

import dataclasses

import numpy as np

from lvm.data.images.sources.base import ImageSource
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.streams.codecs import Image
from tests.lvm.data.images.misbehaving import misbehave

SIDE, SCENES = 16, 40


@dataclasses.dataclass
class PoisonScenes(ImageSource):
    """A source of 40 scenes whose description doesn't depend on its faults."""

    faults: dict  # by scene

    name = "random"
    streams = {"rgb": Image()}  # noqa: RUF012
    stream_sets = (("rgb",),)
    skipped = ()

    def __len__(self):
        return SCENES

    def info(self, index):
        return SceneInfo(f"scene {index}", f"scene {index}", "", 1 + index % 2, ("rgb",))

    def load(self, index):
        misbehave(self.faults.get(index, ""))
        info = self.info(index)
        images = np.random.default_rng(index).integers(0, 256, (info.num_frames, 1, SIDE, SIDE, 3), dtype=np.uint8)
        return SceneImages(info, images)

    def describe(self):
        return {"kind": "random"}
