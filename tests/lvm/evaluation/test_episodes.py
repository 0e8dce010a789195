"""Queries and their examples."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lvm.data.images.sources.scene import SceneInfo
from lvm.evaluation.episodes import Query, first_examples, make_queries
from lvm.evaluation.heldout import HeldoutScene


def bare_scene(index, frames=3, class_name=""):
    info = SceneInfo(f"scene {index}", f"group {index}", class_name, frames, ("rgb",))
    return HeldoutScene(info, np.zeros((frames, 1, 1, 1, 3), np.uint8), np.zeros((frames, 1, 3), int))


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_make_queries_uses_distinct_scenes(count, shots, seed):
    scenes = [bare_scene(index) for index in range(count)]
    queries = make_queries(scenes, 20, shots, seed)
    assert len(queries) == (20 if count > shots else 0)
    for query in queries:
        keys = [query.scene.info.key, *(scene.info.key for scene, _ in query.examples)]
        assert len(set(keys)) == shots + 1
        assert all(0 <= frame < 3 for _, frame in query.examples)
        assert 0 <= query.frame < 3


def test_make_queries_cycles_over_scenes():
    scenes = [bare_scene(index) for index in range(5)]
    queries = make_queries(scenes, 50, 2, seed=0)
    assert [query.scene for query in queries] == scenes * 10
    assert {query.frame for query in queries} == {0, 1, 2}
    assert {query.examples[0][0].info.key for query in queries} == {scene.info.key for scene in scenes}


def test_make_queries_is_deterministic_in_seed_and_index():
    scenes = [bare_scene(index) for index in range(5)]
    few, many, other = (make_queries(scenes, n, 2, seed) for n, seed in ((4, 1), (9, 1), (9, 2)))
    assert many[:4] == few
    assert many != other


def test_make_queries_of_the_same_class():
    scenes = [bare_scene(i, class_name="cat" if i % 2 else "dog") for i in range(7)] + [bare_scene(9, class_name="owl")]
    queries = make_queries(scenes, 14, 2, seed=0, same_class=True)
    assert {query.scene.info.key for query in queries} == {f"scene {i}" for i in range(7)}
    for query in queries:
        assert {scene.info.class_name for scene, _ in query.examples} == {query.scene.info.class_name}
    assert make_queries(scenes, 14, 4, seed=0, same_class=True) == []


def test_first_examples_keeps_the_query():
    scenes = [bare_scene(index) for index in range(5)]
    (query,) = make_queries(scenes, 1, 3, seed=0)
    short = first_examples(query, 1)
    assert (short.scene, short.frame, short.examples) == (query.scene, query.frame, query.examples[:1])


def test_query_prompt_has_pairs_then_the_query(make_heldout_scenes):
    a, b, c = make_heldout_scenes(3)
    query = Query(c, 1, ((a, 0), (b, 1)))
    expected = [a.codes[0, 0], a.codes[0, 1], b.codes[1, 0], b.codes[1, 1], c.codes[1, 0]]
    np.testing.assert_array_equal(query.prompt("rgb", "segmentation"), expected)
    assert query.to_json() == {"query": ["scene 2", 1], "examples": [["scene 0", 0], ["scene 1", 1]]}


def test_make_queries_counts_originals_not_scenes(caplog):
    """Of seven clips, five are of one video: its queries have two examples at most, those of the others six."""
    names = ["a"] * 5 + ["b", "c"]
    scenes = [
        dataclasses.replace(scene, info=dataclasses.replace(scene.info, group=name))
        for scene, name in zip(map(bare_scene, range(7)), names, strict=True)
    ]
    assert {query.group for query in make_queries(scenes, 30, 2, seed=0)} == {"a", "b", "c"}
    assert {query.group for query in make_queries(scenes, 30, 3, seed=0)} == {"b", "c"}
    assert [record.message for record in caplog.records] == [
        "5 of 7 scenes are no queries: too few others for 3 examples"
    ]
    queries = make_queries(scenes, 30, 6, seed=0, same_original=True)
    assert {query.group for query in queries} == {"a", "b", "c"}
    assert all(len({id(scene) for scene, _ in query.examples} | {id(query.scene)}) == 7 for query in queries)
