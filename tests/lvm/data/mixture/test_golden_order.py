"""First outputs of the rules that order data, as literals: a resumed run must go on with the same batches.

A test that fails here has found a change of the order. If the change is meant, raise the version that the test names,
then change its values with it.
"""

import hashlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from lvm.common.seeding import derive_seed
from lvm.data.images.augment import Augment
from lvm.data.images.catalog import Catalog
from lvm.data.images.image_order import RowOrder
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.base import Part
from lvm.data.images.sources.division import PartSpec
from lvm.data.images.sources.scene import SceneImages, SceneInfo
from lvm.data.mixture import mixture, permutation, split
from lvm.data.mixture.counter_rng import CounterRng
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.recipes import (
    Category,
    Interleaved,
    MultiAnnotation,
    Pairs,
    Rotation,
    Separated,
    Single,
    Video,
)
from lvm.data.mixture.rows import Rows
from lvm.data.streams.codecs import Image
from lvm.model.vocabulary import Vocabulary

RECIPES = {
    "category": (Category(images=3), 0.5),
    "interleaved": (Interleaved(frames=2, strides=(1, 2)), 0.25),
    "multi": (MultiAnnotation("rgb", ("segmentation",), num_streams=2, shots=2), 0.3),
    "pairs": (Pairs(shots=2), 0.7),
    "rotation": (Rotation(views=2), 0.4),
    "separated": (Separated(frames=2, strides=(1,)), 0.2),
    "single": (Single(), 1.0),
    "video": (Video(frames=3, strides=(1, 2, 3)), 1.5),
}


@pytest.fixture
def make_mixture(make_store, new_scenes):
    scenes = new_scenes([(1, 0)] * 20 + [(9, 0)] * 30 + [(6, 1)] * 40)
    path = make_store([*scenes[20:45], *scenes[:20], *scenes[45:]])  # as stores of version 3 ordered them

    def make(split="train", **options):
        components = {name: ComponentConfig(recipe, weight) for name, (recipe, weight) in RECIPES.items()}
        return Mixture(MixtureConfig(components, (path,), 0.2, **options), 7, split)

    return make


def test_order_of_data_has_its_version():
    assert mixture.ORDER == 3  # every value below is of this order


def words(scenes, grids):
    """Each sentence as words SCENE.FRAME, with ′ for each further stream."""
    columns = zip(scenes.tolist(), grids.frames.tolist(), grids.streams.tolist(), strict=True)
    return [" ".join(f"{s}.{f}" + "′" * i for s, f, i in zip(*row, strict=True)) for row in columns]


FIRST_SENTENCES = {
    "category": {
        "all": ["85.5 26.0 17.6", "58.2 11.6 67.1", "17.1 67.1 79.5"],
        "blocks": ["3.8 21.1 77.4", "58.2 11.6 67.1", "33.0 24.2 50.5"],
    },
    "interleaved": {
        "all": ["81.1 81.1′ 81.2 81.2′", "53.0 53.0′ 53.2 53.2′", "50.3 50.3′ 50.5 50.5′"],
        "blocks": ["76.1 76.1′ 76.2 76.2′", "89.0 89.0′ 89.2 89.2′", "50.3 50.3′ 50.5 50.5′"],
    },
    "multi": {
        "all": ["69.4′ 69.4 64.3′ 64.3", "74.3 74.3′ 63.2 63.2′", "56.0′ 56.0 58.0′ 58.0"],
        "blocks": ["56.4′ 56.4 79.3′ 79.3", "80.3 80.3′ 71.2 71.2′", "64.0′ 64.0 86.0′ 86.0"],
    },
    "pairs": {
        "all": ["81.1 81.1′ 89.0 89.0′", "75.1 75.1′ 61.1 61.1′", "75.0 75.0′ 85.5 85.5′"],
        "blocks": ["89.1 89.1′ 84.0 84.0′", "52.1 52.1′ 58.1 58.1′", "71.0 71.0′ 85.5 85.5′"],
    },
    "rotation": {
        "all": ["50.5 50.0", "87.2 87.3", "22.8 22.0"],
        "blocks": ["68.5 68.0", "86.2 86.3", "1.8 1.0"],
    },
    "separated": {
        "all": ["63.4 63.5 63.4′ 63.5′", "81.3 81.4 81.3′ 81.4′", "74.2 74.3 74.2′ 74.3′"],
        "blocks": ["54.4 54.5 54.4′ 54.5′", "71.3 71.4 71.3′ 71.4′", "71.2 71.3 71.2′ 71.3′"],
    },
    "single": {
        "all": ["20.5", "42.0", "37.0"],
        "blocks": ["70.3", "82.0", "49.7"],
    },
    "video": {
        "all": ["47.1 47.3 47.5", "71.1 71.3 71.5", "14.2 14.3 14.4"],
        "blocks": ["4.1 4.3 4.5", "77.1 77.3 77.5", "14.2 14.3 14.4"],
    },
}


@pytest.mark.parametrize("shuffle", ["all", "blocks"])
def test_first_sentences_are_those_of_order_3(make_mixture, shuffle):
    """Of each component the first two sentences, and those of a later epoch."""
    components = make_mixture(shuffle=shuffle).components
    indices = {c.name: [0, 1, 5 * c.sentences_per_epoch + 2] for c in components}
    sentences = {c.name: words(*c.select_grids(np.array(indices[c.name]))) for c in components}
    assert sentences == {name: rows[shuffle] for name, rows in FIRST_SENTENCES.items()}


def test_blocks_have_the_components_of_order_3(make_mixture):
    first, later = make_mixture().block(0), make_mixture().block(10**6)
    heldout = make_mixture("heldout").block(0)
    assert [first[0][:32].tolist(), first[1][:32].tolist()] == [
        [7, 7, 0, 1, 7, 6, 6, 7, 2, 6, 7, 4, 3, 7, 6, 0, 3, 6, 6, 3, 4, 0, 6, 2, 0, 7, 6, 3, 7, 6, 2, 7],
        [0, 1, 0, 0, 2, 0, 1, 3, 0, 2, 4, 0, 0, 5, 3, 1, 1, 4, 5, 2, 1, 2, 6, 1, 3, 6, 7, 3, 7, 8, 2, 8],
    ]
    assert [later[0][:8].tolist(), later[1][:8].tolist()] == [
        [3, 1, 7, 7, 7, 7, 7, 6],
        [36948454, 13195876, 79175258, 79175259, 79175260, 79175261, 79175262, 52783505],
    ]
    assert [heldout[0][:8].tolist(), heldout[1][:8].tolist()] == [[6, 3, 7, 4, 3, 7, 7, 0], [0, 0, 0, 0, 1, 1, 2, 0]]
    assert make_mixture().sentences_before(10**6) == [
        26391753,
        13195876,
        15835051,
        36948454,
        21113402,
        10556701,
        52783505,
        79175258,
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "3b04d98b6eae3042"),
        ({"shuffle": "blocks"}, "76aef2e9569b6eb9"),
        ({"packing": "whole"}, "ca0cf2c79e032494"),
        ({"packing": "whole", "weigh_by": "codes", "split": "heldout"}, "d12abd86a53d4d21"),
    ],
)
def test_first_batches_are_those_of_order_3(make_mixture, options, expected):
    rows = Rows(make_mixture(**options), Vocabulary.for_codes(16), context=40, batch_size=8)
    columns = [rows.batch(step)[name] for step in (0, 99) for name in sorted(rows.batch_spec)]
    assert hashlib.sha256(b"".join(map(np.ndarray.tobytes, columns))).hexdigest()[:16] == expected


def test_random_numbers_are_those_of_order_3():
    rng = CounterRng(-5, np.array([0, 3]))
    assert [rng.bits(2).tolist(), rng.integers(np.array([10, 1000])).tolist(), rng.permutations(5).tolist()] == [
        [[10541805934284867288, 13948297436043077827], [14701544950371799958, 17188325478099151805]],
        [0, 340],
        [[4, 1, 2, 0, 3], [2, 0, 4, 3, 1]],
    ]
    assert [derive_seed(3), derive_seed(1, 2, 0)] == [12467808127879573787, 15529898885419721899]


def test_permutations_are_those_of_order_3():
    indices = np.arange(6)
    assert [permutation.permute(indices, n, 3).tolist() for n in (6, 1000, 2**40)] == [
        [1, 4, 5, 2, 3, 0],
        [613, 663, 567, 540, 770, 83],
        [1047012110440, 654752557450, 574879844762, 112900393663, 1032304214044, 181606443685],
    ]
    sizes = np.array([6, 6, 1000, 1000, 10**9, 10**9])
    assert permutation.permute_each(indices % 2, sizes, 3, indices // 2).tolist() == [
        2,
        3,
        322,
        442,
        758020552,
        777302300,
    ]
    far = np.array([0, 1, 4096, 9999])
    assert permutation.shuffle_indices(far, 10_000, 3, "blocks").tolist() == [4561, 8688, 5356, 6329]
    assert permutation.shuffle_indices(far, 10_000, 3, "blocks", scenes=16).tolist() == [2818, 4779, 5385, 7859]


def test_split_is_that_of_every_store_so_far():
    """A change moves scenes from training to the held-out split: it needs another version of stores."""
    hashes = np.array([split.group_hash(f"photo {i}") for i in range(12)], np.uint64)
    assert hashes[:2].tolist() == [12979993899539682694, 9366690598738670299]
    assert np.flatnonzero(split.heldout_mask(hashes, 0.3)).tolist() == [3, 5, 9, 10]


def test_augmented_copies_have_the_windows_of_every_store_so_far():
    """A change makes other copies of the same scenes: a store that is half encoded would mix both."""
    augment = Augment(4, Preprocess(16))
    assert augment.source_preprocess.resolution == 18
    row, column = np.indices((18, 18), np.uint8)
    images = np.stack([row, column, column], axis=-1)[None, None]
    scene = SceneImages(SceneInfo("photo.jpg", "photo", "", 1, ("rgb",)), images)
    corners = [copy.images[0, 0, 0, [0, -1], :2].tolist() for copy in augment(scene, {"rgb": Image()})]
    assert corners == [[[2, 16], [2, 1]], [[2, 2], [2, 17]], [[1, 17], [1, 2]], [[1, 2], [1, 17]]]


def test_training_images_are_those_of_every_run_so_far(tmp_path):
    """A change gives other batches to resumed runs: raise `workdir.RECORD_VERSION` with it."""
    infos = [SceneInfo(f"scene {i}", f"scene {i}", "", 1 + i % 2, ("rgb", "depth", "edges")) for i in range(48)]
    source = SimpleNamespace(
        name="scenes", is_listed=True, plan=lambda shard, num_shards: [PartSpec(0, len(infos))], info=infos.__getitem__,
        part=lambda spec: Part(range(spec.start, spec.stop)), describe=lambda: {},
    )  # fmt: skip
    order = RowOrder(Catalog(source, 0.25, 0, tmp_path), (3, 3), 64, seed=3)

    def images(step):
        with order.images(step, np.arange(6)) as located:
            return [(pickle.loads(image.scene), image.image) for image in located]

    assert images(0) == [(22, 0), (24, 0), (19, 0), (1, 2), (46, 0), (39, 1)]
    assert images(20) == [(47, 0), (0, 0), (7, 1), (36, 1), (0, 0), (2, 1)]
