"""What all prompted tasks share: answers, baselines, ceilings, sweeps."""

import dataclasses

import numpy as np
import pytest

from lvm.common.config import from_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs
from lvm.data.streams.codecs import Image
from lvm.evaluation import baselines
from lvm.evaluation.episodes import make_queries
from lvm.evaluation.evaluator import Evaluator, NotApplicableError, StoppedError
from lvm.evaluation.figures import Metric, Plot, estimate
from lvm.evaluation.prompted import PromptedTask
from lvm.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Exact(PromptedTask):
    """Share of answers that are right."""

    target: str = "segmentation"

    def metrics(self, codec):
        return [Metric("exact", "right answers", "%")]

    def score(self, codec, images, truth, queries):
        return {"exact": (images == truth).all((1, 2, 3)).astype(float)}


CODECS = {"rgb": Image(), "segmentation": Image()}


@pytest.fixture
def scenes(make_heldout_scenes):
    return make_heldout_scenes(5)


def test_prompted_task_scores_model_baselines_and_ceiling(make_context, scenes, knows):
    context = make_context(scenes, CODECS, knows(scenes, "segmentation"))
    figures, (picture,) = Exact(num_queries=8).run(context)
    exact, psnr = figures
    assert exact.estimate.value == exact.ceiling.value == 1.0
    assert exact.estimate.interval is None  # of five originals
    assert {name: x.value for name, x in exact.baselines.items()} == {
        "copied example": 0.0, "copied query": 0.0, "mean image": 0.0,
    }  # fmt: skip
    assert (psnr.name, psnr.estimate.value) == ("psnr", pytest.approx(100))
    assert picture.title == "Segmentation, by example"
    assert "2 example pairs" in picture.text
    assert len(context.episodes) == 8


def of_videos(scenes, count):
    """The scenes as clips of so many videos."""
    return [
        dataclasses.replace(x, info=dataclasses.replace(x.info, group=f"v{i % count:02}")) for i, x in enumerate(scenes)
    ]


def test_intervals_are_over_originals(make_context, make_heldout_scenes, knows):
    """Many queries of twelve videos are twelve samples."""
    scenes = of_videos(make_heldout_scenes(24), 12)
    solved = {scene.grid(i, "rgb").tobytes() for scene in scenes[:6] for i in range(len(scene.images))}
    solved |= {scene.grid(i, "rgb").tobytes() for scene in scenes[12:18] for i in range(len(scene.images))}
    truth = knows(scenes, "segmentation")
    answer = lambda grid: truth(grid) if np.asarray(grid[-1]).tobytes() in solved else grid[-1]  # noqa: E731
    exact = Exact(num_queries=240).run(make_context(scenes, CODECS, answer))[0][0]
    by_video = estimate(np.repeat([1.0, 0.0], 6))
    assert (exact.estimate.value, exact.estimate.interval) == (0.5, by_video.interval)
    assert "240 queries of 12 originals" in exact.text


def test_examples_are_of_other_originals(make_context, make_heldout_scenes):
    scenes = of_videos(make_heldout_scenes(6), 3)
    context = make_context(scenes, CODECS)
    groups = {scene.info.key: scene.info.group for scene in scenes}
    for same_original in (False, True):
        Exact(num_queries=30, same_original=same_original).run(context)
        shared = [any(groups[key] == groups[x["query"][0]] for key, _ in x["examples"]) for x in context.episodes]
        assert any(shared) == same_original
        assert all(key != x["query"][0] for x in context.episodes for key, _ in x["examples"])
    one = make_context(of_videos(scenes, 1), CODECS)
    with pytest.raises(NotApplicableError, match=r"6 suitable held-out scenes of one original; .* same_original=true"):
        Exact().run(one)
    figures, _ = Exact(same_original=True).run(one)
    assert figures[1].estimate.interval is None


def test_prompted_task_scores_each_baseline_as_an_answer(make_context, scenes):
    context = make_context(scenes, CODECS, lambda grid: grid[-2])  # the last example's annotation
    psnr = Exact(num_queries=8).run(context)[0][1]
    assert psnr.estimate.value == psnr.baselines["copied example"].value < 20
    context = make_context(scenes, CODECS)
    psnr = Exact(num_queries=8).run(context)[0][1]
    assert psnr.estimate.value == psnr.baselines["copied query"].value


def test_figures_do_not_depend_on_the_batch_size(make_context, scenes):
    results = [Exact(num_queries=7).run(make_context(scenes, CODECS, batch_size=size))[0] for size in (1, 3, 64)]
    assert results[0] == results[1] == results[2]


def test_equal_questions_are_asked_once(make_context, scenes):
    context = make_context(scenes, CODECS, batch_size=4)
    for _ in range(2):
        Exact(num_queries=6).run(context)
    assert context.model.num_prompts == 6
    assert context.model.batch_sizes == [4, 2]
    Exact(num_queries=6, sampling=SamplingParams(0.5)).run(context)
    assert context.model.num_prompts == 12


def test_sweep_asks_the_same_queries_with_fewer_examples(make_context, scenes):
    context = make_context(scenes, CODECS)
    _, (_, plot) = Exact(num_queries=6, shots=2, sweep=(1, 3)).run(context)
    assert isinstance(plot.content, Plot)
    assert [point[0] for point in plot.content.series["exact"]] == [1, 2, 3]
    assert context.model.num_prompts == 18
    assert all(len(episode["examples"]) == 3 for episode in context.episodes)


@pytest.mark.parametrize(
    ("videos", "same_original", "count"), [(6, False, 10), (3, False, 8), (3, True, 10), (1, True, 10)]
)
def test_mean_image_leaves_the_original_of_the_query_out(make_heldout_scenes, videos, same_original, count):
    """Or the scene, if examples may be other scenes of the original."""
    scenes = of_videos(make_heldout_scenes(6), videos)
    queries = make_queries(scenes, 12, 2, seed=0, same_original=same_original)
    means = baselines.mean_image(queries, "segmentation", same_original)
    truth = np.stack([query.scene.image(query.frame, "segmentation") for query in queries]).astype(float)
    name = (lambda query: query.scene.info.key) if same_original else (lambda query: query.group)
    others = [i for i, query in enumerate(queries) if name(query) != name(queries[0])]
    assert len(others) == count
    np.testing.assert_array_equal(means[0], np.rint(truth[others].mean(0)))


def test_nearest_neighbor_answers_with_its_annotation(make_context, make_heldout_scenes, make_store, new_scenes):
    stored = new_scenes([(1, 1)] * 6)
    path = make_store(stored)
    mixture = MixtureConfig({"pairs": ComponentConfig(Pairs())}, (path,), heldout_fraction=0.0)
    context = make_context([], CODECS, mixture=mixture)
    assert baselines.training_pairs(context, "rgb", "segmentation") is None  # not a training store
    context.model.record["stores"] = [baselines.Store(path).identity()]
    inputs, targets = baselines.training_pairs(context, "rgb", "segmentation")
    assert baselines.training_pairs(context, "rgb", "depth") is None
    assert sorted(map(tuple, inputs)) == sorted(tuple(scene.codes[0, 0]) for scene in stored)
    query = make_queries(make_heldout_scenes(2), 1, 1, seed=0)[0]
    near = inputs[3].astype(np.int32)
    near[0] = (near[0] + 1) % 16  # still the nearest
    scene = dataclasses.replace(query.scene, codes=np.broadcast_to(near, (2, 2, 4)))
    as_image = lambda codes: codes.reshape(-1, 2, 2, 1).repeat(3, axis=-1).astype(np.uint8)  # noqa: E731
    context.tokenizer = dataclasses.replace(context.tokenizer, decode=as_image)
    answer = baselines.nearest_neighbor(context, [dataclasses.replace(query, scene=scene)], "rgb", "segmentation")
    np.testing.assert_array_equal(answer, as_image(targets[3:4]))


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (Exact(target="depth"), "no held-out scene has the streams rgb and depth"),
        (
            Exact(shots=5),
            "5 suitable held-out scenes; a query needs 5 of other originals than its own, unless same_original=true",
        ),
        (Exact(same_class=True, shots=5), "same_class=True, but the scenes have no classes"),
    ],
)
def test_prompted_task_is_not_applicable_to_other_scenes(make_context, scenes, task, reason):
    with pytest.raises(NotApplicableError, match=reason):
        task.run(make_context(scenes, CODECS))


def test_prompt_that_exceeds_the_context_is_user_error(make_context, scenes):
    with pytest.raises(UserError, match="8 example pairs, a query and its answer are 18 images; the context holds 16"):
        Exact(shots=2, sweep=(8,)).run(make_context(scenes, CODECS))


def test_stopping_gives_up_between_batches(make_context, scenes):
    context = make_context(scenes, CODECS, batch_size=4, stopping=lambda: context.model.num_prompts >= 4)
    with pytest.raises(StoppedError):
        Exact(num_queries=8).run(context)
    assert context.model.num_prompts == 4


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"shots": 0}, "shots=0"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"sweep": (0, 1)}, "sweep"),
        ({"target": "rgb"}, "target='rgb'"),
        ({"every": -1}, "every=-1"),
        ({"sampling": {"temperature": -1.0}}, "sampling.temperature=-1.0"),
    ],
)
def test_prompted_config_rejects_impossible_values(fields, key):
    with pytest.raises(UserError, match=rf"^config\.{key}".replace("(", r"\(")):
        from_config_dict(Evaluator, {"kind": "segmentation", **fields}, "config")


def test_evaluators_are_selected_by_kind():
    for kind, evaluator in Evaluator.kinds.items():
        config = from_config_dict(Evaluator, {"kind": kind, **({"target": "gray"} if kind == "restoration" else {})})
        assert type(config) is evaluator
        assert from_config_dict(Evaluator, to_json(config)) == config
    with pytest.raises(UserError, match=r"kind: 'nothing' is not one of .*segmentation"):
        from_config_dict(Evaluator, {"kind": "nothing"})


def test_query_of_a_class_with_too_few_scenes_is_named(make_context, make_heldout_scenes):
    scenes = make_heldout_scenes(4)
    scenes = [dataclasses.replace(x, info=dataclasses.replace(x.info, class_name="cat")) for x in scenes]
    with pytest.raises(NotApplicableError, match="a query needs 5 of its class of other originals than its own"):
        Exact(same_class=True, shots=5).run(make_context(scenes, {"rgb": Image(), "segmentation": Image()}))
