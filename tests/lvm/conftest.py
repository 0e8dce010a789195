"""Small scene stores and held-out scenes of random codes."""

import numpy as np
import pytest

from lvm.data.images.sources.scene import SceneInfo
from lvm.data.mixture.split import group_hash
from lvm.data.store import writer
from lvm.data.store.format import Scene
from lvm.data.streams.codecs import Edges, Image, Palette
from lvm.evaluation.heldout import HeldoutScene

NUM_CODES, GRID = 16, (2, 2)
STREAM_SETS = (("rgb",), ("rgb", "segmentation"), ("edges", "rgb"), ("rgb", "segmentation", "edges"))
CLASSES = ("", "cat", "dog")


def make_scenes(shapes, seed=0, groups=None):
    """Scenes of random codes; `shapes` are (frames, stream set), the group of each is its own by default."""
    rng = np.random.default_rng(seed)
    scenes = []
    for i, (frames, stream_set) in enumerate(shapes):
        size = (frames, len(STREAM_SETS[stream_set]), GRID[0] * GRID[1])
        codes = rng.integers(0, NUM_CODES, size, dtype=np.uint16)
        group = f"group {i}" if groups is None else groups[i]
        scenes.append(Scene(f"scene {i}", CLASSES[i % 3], STREAM_SETS[stream_set], codes, group_hash(group)))
    return scenes


def header(weights="a" * 64, grid=GRID, **identity):
    """The header of a store's manifest."""
    codecs = {"rgb": Image(), "segmentation": Palette(("nothing", "thing"), background=0), "edges": Edges()}
    return {
        "tokenizer": {"weights": weights, "hash": weights, "grid": list(grid), "num_codes": NUM_CODES, **identity},
        "streams": {name: codec.to_json() for name, codec in codecs.items()},
    }


@pytest.fixture
def make_store(tmp_path):
    """(scenes or their shapes, name, num_shards, weights, grid) → the path of a finished store."""

    def make(content, name="store", num_shards=2, **options):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        scenes = content if content and isinstance(content[0], Scene) else make_scenes(content)
        for shard in range(num_shards):
            part = scenes[len(scenes) * shard // num_shards : len(scenes) * (shard + 1) // num_shards]
            writer.write_shard(folder, shard, num_shards, part, NUM_CODES, writer.SkippedItems(groups=[0, 2**64 - 1]))
        assert not writer.write_manifest(folder, header(**options), num_shards)
        return str(folder)

    return make


@pytest.fixture
def make_heldout_scenes():
    """(count, streams, frames) → held-out scenes; a grid is the image's own bytes, so decoding is exact."""

    def make(count, streams=("rgb", "segmentation"), frames=2, seed=0, palette=None):
        rng = np.random.default_rng(seed)
        heldout = []
        for i in range(count):
            images = rng.integers(0, 256, (frames, len(streams), 4, 4, 3), dtype=np.uint8)
            if palette is not None:
                column = streams.index("segmentation")
                for frame in range(frames):
                    ids = rng.integers(0, len(palette.names), (4, 4))
                    images[frame, column] = palette.render(ids)
            info = SceneInfo(f"scene {i}", f"group {i}", "", frames, tuple(streams))
            heldout.append(HeldoutScene(info, images, encode(images)))
        return heldout

    return make


def encode(images):
    """Encodes images uint8 [..., 4, 4, 3] as codes int32 [..., 48]: their bytes."""
    return images.reshape(*images.shape[:-3], 48).astype(np.int32)


def decode(codes):
    """Decodes codes int [B, 48] of `encode`."""
    return codes.reshape(-1, 4, 4, 3).astype(np.uint8)


@pytest.fixture(scope="session")
def exact_codec():
    """A lossless (encode, decode) pair."""
    return encode, decode


@pytest.fixture
def new_scenes():
    """`make_scenes`."""
    return make_scenes


@pytest.fixture
def manifest_header():
    """`header`."""
    return header
