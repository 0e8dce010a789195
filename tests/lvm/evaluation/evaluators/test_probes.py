"""Probes: labels worked by hand, figures of scenes whose codes tell the label."""

import dataclasses
import types

import numpy as np
import pytest

from lvm.data.images.sources.scene import SceneInfo
from lvm.data.mixture.mixture import MixtureConfig
from lvm.data.streams.codecs import Depth, Image, Palette
from lvm.evaluation import heads, probing
from lvm.evaluation.evaluator import Context, NotApplicableError, Tokenizer
from lvm.evaluation.evaluators import probes
from lvm.evaluation.evaluators.probes import Probes
from lvm.evaluation.heldout import HeldoutScene
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference.pretrained import LVM
from tests.lvm.small_models import SMALL, small_model

PALETTE = Palette(("nothing", "cat", "dog", "void"), background=0, ignore=3)
CODECS = {"rgb": Image(), "segmentation": PALETTE, "depth": Depth(1, 255, "mm")}
GRID = (2, 2)  # cells of 2 × 2 pixels, whose code is their gray level


def encode(images):
    return (images[..., 0].reshape(-1, 2, 2, 2, 2).mean((2, 4)) // 16).reshape(-1, 4).astype(np.int32)


def make_scene(i, num_frames=2):
    """A cell's gray level is 20 for nothing, 120 for a cat, 220 for a dog; its depth follows the level."""
    rng = np.random.default_rng(i)
    ids = rng.integers(0, 3, (num_frames, *GRID)).repeat(2, 1).repeat(2, 2)
    gray = (np.array([20, 120, 220])[ids] + rng.integers(-10, 11, ids.shape)).astype(np.uint8)
    maps = [np.repeat(gray[..., None], 3, -1), np.stack([PALETTE.render(x) for x in ids])]
    maps.append(np.stack([CODECS["depth"].render(np.float32(40 + 80 * x)) for x in ids]))
    images = np.stack(maps, axis=1)
    streams = tuple(CODECS)
    codes = encode(images.reshape(-1, 4, 4, 3)).reshape(num_frames, 3, 4)
    info = SceneInfo(f"scene {i}", f"group {i // 2}", ("cat", "dog")[i % 2], num_frames, streams)
    return HeldoutScene(info, images, codes)


def make_context(scenes, mesh=None, **options):
    checkpoint = small_model(num_layers=2)
    model = LVM(checkpoint.config, SMALL, checkpoint.load_params(), {"stores": []}, 0, mesh)
    tokenizer = Tokenizer(encode, lambda codes: codes, {"grid": list(GRID)}, 16, 4)
    context = Context(model, tokenizer, MixtureConfig(), types.SimpleNamespace(name="given"), **options)
    names = scenes[0].info.streams
    context.heldout = types.SimpleNamespace(
        scenes=scenes,
        codecs={name: CODECS[name] for name in names},
        with_streams=lambda streams: [s for s in scenes if set(streams) <= set(s.info.streams)],
    )
    return context


SETTINGS = Probes(num_images=32, folds=2, attentive_steps=2, fit_cells=60, l2=1e-3)


@pytest.fixture(scope="module", autouse=True)
def loose_fits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_GRADIENT_TOLERANCE", 1e-6)
        yield


@pytest.fixture(scope="module")
def figures():
    other = small_model(num_layers=2, seed=1).load_params()  # as random as those that take seconds to compile
    context = make_context([make_scene(i) for i in range(20)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LVM, "with_random_params", lambda model, seed: model.with_params(other, 0))
        return {figure.name: figure for figure in SETTINGS.run(context)[0]}


def test_probes_read_what_codes_tell(figures):
    foreground, classes, depth = (figures[name] for name in ("foreground_iou", "cell_class_miou", "depth_rmse"))
    assert foreground.estimate.value > 0.95
    assert classes.estimate.value > 0.95
    assert depth.baselines["code embedding"].value < 20  # mm, of a spread of 65
    assert depth.estimate.value < 45
    for figure, worse in ((foreground, 0.8), (classes, 0.4)):
        assert figure.baselines["position alone"].value < worse
        assert figure.baselines["random code vectors"].value > 0.95  # the codes alone tell it
    assert depth.baselines["position alone"].value > 50
    assert set(foreground.baselines) == {
        "code embedding", "random code vectors", "random network, same layer", "position alone",
    }  # fmt: skip
    assert foreground.estimate.interval is not None


def test_probes_have_figures_of_all_heads_and_copies(figures):
    of_images = [f"{task}_accuracy/{head}{end}" for task in ("class", "count")
                 for head in ("mean", "last", "knn", "attentive") for end in ("", "/middle")]  # fmt: skip
    of_cells = ["foreground_iou", "cell_class_miou", "depth_rmse"]
    assert set(figures) == {
        *of_images,
        *(f"{name}{end}" for name in of_cells for end in ("", "/middle", "/second_copy")),
    }
    assert {"most frequent", "histogram of codes"} <= set(figures["count_accuracy/knn"].baselines)
    assert "first copy" in figures["foreground_iou/second_copy"].baselines
    assert "layer 1 of 2" in figures["foreground_iou/middle"].text


@pytest.mark.slow
def test_probes_do_not_depend_on_batch_or_devices(figures):
    scenes = [make_scene(i) for i in range(20)]
    for options in ({"batch_size": 3}, {"mesh": make_mesh(MeshConfig(data=4, tensor=2))}):
        for figure in SETTINGS.run(make_context(scenes, **options))[0]:
            assert figure.estimate.value == pytest.approx(figures[figure.name].estimate.value, abs=2e-3), figure.name


def test_probe_images_share_folds_by_group():
    context = make_context([make_scene(i, 5) for i in range(8)])
    images = probing.choose_images(context, "rgb", 24, 4)
    assert [frame for _, frame in images.frames[:3]] == [0, 2, 4]
    groups = [scene.info.group for scene, _ in images.frames]
    assert len({(group, fold) for group, fold in zip(groups, images.folds.tolist(), strict=True)}) == 4
    assert sorted(set(images.folds.tolist())) == [0, 1, 2, 3]
    with pytest.raises(NotApplicableError, match="4 groups of held-out scenes with the stream rgb; needs 5"):
        probing.choose_images(context, "rgb", 24, 5)
    few = probing.choose_images(context, "rgb", 4, 2)
    assert [scene.info.key for scene, _ in few.frames] == ["scene 0", "scene 2", "scene 4", "scene 6"]


def test_probe_images_are_as_many_as_asked(caplog):
    scenes = [make_scene(i, num_frames) for i, num_frames in enumerate([1, 1, 7, 7, 7, 7, 7, 7])]
    context = make_context(scenes, max_scenes=8)
    for count in (2, 3, 5, 7, 8, 15, 20, 31, 44):
        images = probing.choose_images(context, "rgb", count, 1)
        assert len(images) == len({(scene.info.key, frame) for scene, frame in images.frames}) == count
        groups = [scene.info.group for scene, _ in images.frames]
        pairs = set(zip(groups, images.groups.tolist(), strict=True))
        assert len(pairs) == len(set(groups)) == len(set(images.groups.tolist()))
    assert not caplog.records
    assert len(probing.choose_images(context, "rgb", 50, 4)) == 44
    assert (
        "44 images are probed, not num_images=50: all rgb of 8 held-out scenes, which config.max_scenes=8"
        in caplog.text
    )


def test_tasks_of_one_fold_are_left_out(caplog):
    context = make_context([make_scene(i) for i in range(8)])
    images = probing.choose_images(context, "rgb", 16, 4)
    names = [task.name for task in probing.make_tasks(context, images, "segmentation", "depth", GRID)]
    one = dataclasses.replace(images, folds=images.folds * 0 + 1)
    assert not probing.make_tasks(context, one, "segmentation", "depth", GRID)
    assert len(caplog.records) == len(names) == 5
    assert "no depth_rmse: the 16 labeled images are in 1 of the folds; heads need some in two" in caplog.text


def test_middle_layer_is_not_the_last():
    task = probing.ForegroundIoU("iou", "IoU", np.zeros((2, 4), int))
    value = task.estimate(task.labels, np.arange(2))
    sets = (probes._FIRST, probes._RANDOM, probes._PRIOR)
    estimates = {("iou", "linear", features, layer): value for features in sets for layer in range(3)}
    for layers, names in (([0, 1], ["iou"]), ([0, 1, 2], ["iou", "iou/middle"])):
        assert [figure.name for figure in probes._figures(task, estimates, layers, 2)] == names


def test_cell_labels_are_majorities_without_void():
    ids = np.array([[1, 1, 0, 2], [3, 3, 2, 2], [3, 3, 0, 1], [3, 3, 1, 0]], np.uint8)
    assert probing.cells(ids[None], GRID)[0].tolist() == [[1, 1, 3, 3], [0, 2, 2, 2], [3] * 4, [0, 1, 1, 0]]
    assert probing.majority(probing.cells(ids[None], GRID), 3).tolist() == [[1, 2, probing.VOID, 0]]
    assert probing.majority(np.full((1, 2, 4), 3), 3).tolist() == [[probing.VOID] * 2]


def test_regions_are_counted_by_class():
    ids = np.zeros((20, 20), np.uint8)
    assert probing.count_regions(ids, PALETTE) == 0
    ids[:5, :5], ids[:5, 5:8], ids[10:14, :4], ids[15:, 15:] = 1, 2, 1, 3  # touching classes, a second cat, void
    ids[19, 0] = 2  # a speck of less than 0.5 %
    assert probing.count_regions(ids, PALETTE) == 3


def test_probe_figures_are_of_sums_over_images():
    labels, predicted = np.array([[1, 1, 0, -1], [0, 0, 1, 1]]), np.array([[1, 0, 0, 1], [1, 0, 1, 1]])
    iou = probing.ForegroundIoU("iou", "", labels)
    assert iou.estimate(predicted, np.array([0, 1])).value == pytest.approx(3 / 5)  # 1/2 and 2/3
    accuracy = probing.Accuracy("accuracy", "", labels)
    assert accuracy.estimate(predicted, np.array([0, 0])).value == pytest.approx(5 / 7)
    miou = probing.ClassIoU("miou", "", labels, num_classes=2)
    assert miou.estimate(predicted, np.array([0, 1])).value == pytest.approx((2 / 4 + 3 / 5) / 2)
    depth = probing.RootMeanSquare("rmse", "", np.array([[1.0, np.nan], [2.0, 4.0]]))
    assert depth.estimate(np.array([[2.0, 9.0], [2.0, 2.0]]), np.array([0, 1])).value == pytest.approx(np.sqrt(5 / 3))
    wrong = probing.ForegroundIoU("iou", "", np.ones((24, 3), int)).estimate(np.zeros((24, 3), int), np.arange(24))
    assert wrong.interval == (0.0, 0.0)
    right = np.random.default_rng(0).integers(0, 2, 12)
    accuracy, numbers = probing.Accuracy("accuracy", "", np.ones(120, int)), np.arange(12)
    of_images, of_videos = (accuracy.estimate(right.repeat(10), x) for x in (np.arange(120), numbers.repeat(10)))
    once = probing.Accuracy("accuracy", "", np.ones(12, int)).estimate(right, numbers)
    assert of_videos.interval == pytest.approx(once.interval)
    assert np.diff(of_images.interval) < 0.5 * np.diff(of_videos.interval)
    # Labels of two originals of twelve are two samples.
    labels = np.where(np.arange(120) < 20, 1, probing.VOID)
    few = probing.Accuracy("accuracy", "", labels).estimate(np.ones(120, int), numbers.repeat(10))
    assert (few.value, few.interval) == (1.0, None)
    depth = np.where(np.arange(120)[:, None] < 20, 1.0, np.nan)
    few = probing.RootMeanSquare("rmse", "", depth).estimate(np.zeros((120, 1)), numbers.repeat(10))
    assert (few.value, few.interval) == (1.0, None)
    empty = probing.ForegroundIoU("iou", "", np.full((2, 3), probing.VOID))
    assert np.isnan(empty.estimate(np.zeros((2, 3), int), np.array([0, 1])).value)
