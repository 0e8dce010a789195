"""Listings of training images: on disk, not in memory."""

import gc
import pickle
import weakref
from types import SimpleNamespace

from lvm.data.images.catalog import Catalog
from lvm.data.images.sources.base import Part
from lvm.data.images.sources.division import PartSpec
from lvm.data.images.sources.scene import SceneInfo


class Scene:
    def __init__(self, index):
        self.index = index


def test_open_listing_keeps_no_scene_in_memory(tmp_path):
    scenes, released = [], []

    def part(spec):
        listed = [Scene(i) for i in range(spec.start, spec.stop)]
        scenes.extend(map(weakref.ref, listed))
        return Part(listed, release=lambda: released.append(spec))

    source = SimpleNamespace(
        name="scenes", is_listed=True, plan=lambda shard, num_shards: [PartSpec(0, 40)], part=part,
        info=lambda scene: SceneInfo(f"{scene.index}", f"{scene.index}", "", 2, ("rgb",)), describe=lambda: {},
    )  # fmt: skip
    catalog = Catalog(source, 0.0, 0, tmp_path)
    listing = catalog.acquire(0).result()
    gc.collect()
    assert len(scenes) == 40
    assert not any(scene() for scene in scenes)
    stored, image = listing.image(0, 75)
    assert (pickle.loads(stored).index, image) == (37, 1)
    assert not released
    catalog.release(0)
    assert released == [PartSpec(0, 40)]
