"""Edges, normals, boxes, keypoints, colorization and restoration of answers that are perfect or the query itself."""

import dataclasses

import numpy as np
import pytest

from lvm.data.streams.codecs import Box, Boxes, Edges, Image, Normals, Pose
from lvm.evaluation.episodes import make_queries
from lvm.evaluation.evaluator import NotApplicableError
from lvm.evaluation.evaluators.colorization import Colorization
from lvm.evaluation.evaluators.detection import Detection
from lvm.evaluation.evaluators.edges import EdgesTask
from lvm.evaluation.evaluators.keypoints import Keypoints
from lvm.evaluation.evaluators.normals import NormalsTask
from lvm.evaluation.evaluators.restoration import Restoration

SIDE = 24
BOXES, POSE = Boxes(("cat", "dog")), Pose(("nose", "tail"), radius=1)
CODECS = {"rgb": Image(), "edges": Edges(), "normals": Normals(), "boxes": BOXES, "pose": POSE}


def render(stream, seed):
    rng = np.random.default_rng(seed)
    if stream == "edges":
        strength = np.zeros((SIDE, SIDE))
        strength[:, rng.integers(2, SIDE - 2)] = 1
        return CODECS["edges"].render(strength)
    if stream == "normals":
        vectors = rng.normal(size=(SIDE, SIDE, 3))
        return CODECS["normals"].render(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    if stream == "boxes":
        x, y = rng.integers(0, SIDE - 9, 2).tolist()
        return BOXES.render([Box(int(rng.integers(2)), x, y, x + 9, y + 8)], (SIDE, SIDE))
    return POSE.render(rng.permutation(9)[:4].reshape(1, 2, 2) * 2.5 + 1, (SIDE, SIDE))


@pytest.fixture
def run(make_context, make_heldout_scenes):
    """(task, stream) → figures of perfect answers to it."""

    def run(task, stream=None, codecs=CODECS):
        scenes = []
        for number, scene in enumerate(make_heldout_scenes(4, streams=(task.input, task.target), frames=1)):
            noise = np.random.default_rng(number).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
            images = noise if stream is None else np.stack([noise[0], render(stream, number)])
            codes = np.full((1, 2, 48), 2 * number) + np.arange(2)[:, None]  # names of the images
            scenes.append(dataclasses.replace(scene, images=images[None], codes=codes))
        pictures = np.concatenate([scene.images[0] for scene in scenes])
        context = make_context(scenes, codecs, lambda grid: grid[-1] + 1)
        context.tokenizer = dataclasses.replace(context.tokenizer, decode=lambda codes: pictures[codes[:, 0]])
        return {figure.name: figure for figure in task.run(context)[0]}

    return run


@pytest.mark.parametrize(
    ("task", "stream", "perfect"),
    [
        (EdgesTask(num_queries=6, thresholds=5), "edges", {"ods": 1, "ois": 1}),
        (NormalsTask(num_queries=6), "normals", {"mean_angle": 0, "within_11.25": 1, "within_30": 1}),
        (Detection(num_queries=6), "boxes", {"box_iou": 1}),
        (Keypoints(num_queries=6), "pose", {"pck": 1, "precision": 1}),
        (Colorization(num_queries=6), None, {"mse_imagenet": 0, "mse_pixels": 0, "ssim": 1}),
        (Restoration(num_queries=6), None, {"ssim": 1}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_perfect_answers_are_above_all_baselines(run, task, stream, perfect):
    figures = run(task, stream, {**CODECS, "gray": Image(), "noisy": Image()})
    assert {*perfect, "psnr"} <= figures.keys()
    for name, value in perfect.items():
        figure = figures[name]
        assert figure.estimate.value == pytest.approx(value, abs=0.05), name
        assert figure.ceiling.value == figure.estimate.value
        for baseline, other in figure.baselines.items():
            if not np.isnan(other.value):  # no answered keypoint has no precision
                better = other.value < value if figure.higher_is_better else other.value > value
                assert better, (name, baseline)


def test_detection_baseline_marks_the_whole_image(run):
    figure = run(Detection(num_queries=4), "boxes")["box_iou"]
    assert figure.baselines["the whole image"].value == pytest.approx(72 / SIDE**2)


def test_colorization_errors_by_hand():
    black, gray = np.zeros((1, 11, 11, 3), np.uint8), np.full((1, 11, 11, 3), 51, np.uint8)
    scores = Colorization().score(Image(), gray, black, [])
    assert scores["mse_pixels"].item() == pytest.approx(3 * 0.2**2)
    expected = np.mean(0.2**2 / np.array([0.229, 0.224, 0.225]) ** 2)
    assert scores["mse_imagenet"].item() == pytest.approx(expected)


def test_detection_and_keypoints_skip_other_scenes(make_context, make_heldout_scenes):
    two_boxes = BOXES.render([Box(0, 0, 0, 3, 3), Box(1, 9, 9, 12, 12)], (SIDE, SIDE))
    large = BOXES.render([Box(0, 0, 0, 20, 20)], (SIDE, SIDE))
    two_people = POSE.render(np.array([[[3, 3], [9, 9]], [[20, 3], [20, 20]]]), (SIDE, SIDE))
    for task, stream, image in (
        (Detection(), "boxes", two_boxes),
        (Detection(), "boxes", large),
        (Detection(), "boxes", np.zeros_like(large)),
        (Keypoints(), "pose", two_people),
        (Keypoints(), "pose", np.zeros_like(large)),
    ):
        pair = np.stack([np.zeros_like(image), image])[None]
        scenes = [dataclasses.replace(s, images=pair) for s in make_heldout_scenes(4, ("rgb", stream), frames=1)]
        assert len(make_queries(scenes, 4, 2, 0)) == 4
        with pytest.raises(NotApplicableError, match="0 suitable held-out scenes"):
            task.run(make_context(scenes, CODECS))


def test_normals_without_reading_have_no_value():
    truth = np.zeros((1, 4, 4, 3), np.uint8)
    scores = NormalsTask().score(Normals(), truth + np.uint8(200), truth, [])
    assert all(np.isnan(values).all() for values in scores.values())


def test_edges_that_were_scaled_away_have_no_figures(make_context, make_heldout_scenes):
    scenes = []
    for scene in make_heldout_scenes(4, streams=("rgb", "edges")):
        images = scene.images.copy()
        images[:, 1] = Edges().render(np.full(images.shape[2:4], 0.4))
        scenes.append(dataclasses.replace(scene, images=images))
    with pytest.raises(NotApplicableError, match=r"no edge of the 4 queries has a strength of 0\.5 or more at 4×4"):
        EdgesTask(num_queries=4).run(make_context(scenes, CODECS))
