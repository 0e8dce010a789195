"""The order of data is a function of (config, seed, step), at any size and for any number of processes and workers."""

import dataclasses
import hashlib
import os
import socket
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.data.mixture import sentences
from lvm.data.mixture.loader import prefetch_batches
from lvm.data.mixture.mixture import ComponentConfig, Mixture, MixtureConfig
from lvm.data.mixture.permutation import SHUFFLES
from lvm.data.mixture.recipes import Category, Pairs, Single, VaryingPairs, Video
from lvm.data.mixture.rows import Rows
from lvm.data.mixture.sampler import RankIndex, RunIndex
from lvm.data.mixture.split import group_hash
from lvm.data.store.format import SCENE_DTYPE, Scene
from lvm.data.store.jsonl import LineReads
from lvm.data.store.reader import Store
from lvm.model.vocabulary import Vocabulary
from tests.commands import ROOT, run

HUGE = 2_000_000_000


class HugeStore(Store):
    """A store of two billion virtual one-image scenes, whose codes encode the index of the scene."""

    path, stream_sets, classes, codes_per_image, num_codes = "huge", (("rgb",),), (), 4, 2**16
    manifest = {"tokenizer": {"weights": "", "hash": "", "grid": [2, 2], "num_codes": 2**16}}  # noqa: RUF012

    indexes, kinds = (), None

    def __init__(self, length):
        self.indexes = [np.broadcast_to(np.array((2**63, 0, -1, 1, 0), SCENE_DTYPE), (length,))]

    def entries(self, numbers):
        entries = np.array(self.indexes[0][numbers])
        entries["group"] = numbers
        return entries

    def heldout(self, fraction, entries):
        return np.zeros(len(entries), bool)

    def reads(self, entries, frames, columns):
        return LineReads(entries["group"].astype("<i8").view("<u2").reshape(-1, 4))

    def identity(self):
        return "huge"


class EveryScene(RankIndex):
    """Selects all scenes without reading the index."""

    def __init__(self, indexes, predicate):
        self._total = sum(map(len, indexes))
        self._starts = np.array([0, self._total])


@pytest.mark.parametrize(
    ("packing", "shuffle"),
    [
        ("concat", "all"),
        ("whole", "blocks"),
        pytest.param("concat", "blocks", marks=pytest.mark.slow),
        pytest.param("whole", "all", marks=pytest.mark.slow),
    ],
)
def test_two_billion_sentences_are_fast_in_little_memory(monkeypatch, packing, shuffle):
    monkeypatch.setattr("lvm.data.mixture.sentences.RankIndex", EveryScene)
    monkeypatch.setattr("lvm.data.mixture.sentences.split_chunks", lambda indexes: ())
    monkeypatch.setattr("lvm.data.mixture.mixture._open_stores", lambda config, parts: ({"huge": HugeStore(HUGE)}, {}))
    monkeypatch.setattr("lvm.data.mixture.mixture._check_scenes", lambda *arguments: "")
    tracemalloc.start()
    start = time.process_time()
    config = MixtureConfig({"single": ComponentConfig(Single())}, ("huge",), 0.0, packing=packing, shuffle=shuffle)
    rows = Rows(Mixture(config, 0), Vocabulary.for_codes(2**16), context=24, batch_size=64)
    assert rows.mixture.components[0].sentences_per_epoch == HUGE
    sentences = {}
    for row in (0, 2**31, HUGE // 4 - 4096):  # 4 sentences of 6 tokens a row
        tokens = rows.batch(row // 64)["tokens"]
        if packing == "whole":
            codes = tokens[:, :24].reshape(-1, 6)[:, 1:5]
            scenes = np.ascontiguousarray(codes.astype("<u2")).view("<i8").ravel()
            assert (tokens[:, :24:6] == 2**16).all()
            assert scenes.min() >= 0
            assert scenes.max() < HUGE
            sentences[row] = set(scenes.tolist())
            assert len(sentences[row]) == 256
    assert time.process_time() - start < 15
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    if packing == "whole":
        assert not sentences[0] & sentences[HUGE // 4 - 4096]  # the same epoch


@given(st.lists(st.booleans(), max_size=60), st.sets(st.integers(0, 59)))
def test_run_index_selects_as_a_mask_does(usable, scenes):
    mask, listed = np.array(usable, bool), np.sort(np.array([i for i in scenes if i < len(usable)], np.int64))
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    firsts, counts = edges[::2], edges[1::2] - edges[::2]
    among = np.isin(np.arange(len(mask)), listed)
    for inverse, expected in ((False, mask & among), (True, mask & ~among)):
        index = RunIndex.within(firsts, counts, listed, inverse=inverse)
        assert index.select(np.arange(len(index))).tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.parametrize("fraction", [0.0, 2**-8, 0.2])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_manifest_selects_as_the_indexes_do(make_store, new_scenes, monkeypatch, fraction, split):
    scenes = [[dataclasses.replace(x, class_name="") for x in new_scenes([(4 + i, i)] * 400, seed=i)] for i in range(2)]
    paths = tuple(make_store(scenes[i], f"store{i}", num_shards=3) for i in range(2))
    components = {"single": ComponentConfig(Single()), "pairs": ComponentConfig(Pairs(shots=2), store=paths[1:])}
    config = MixtureConfig(components, paths, fraction, allow_missing=True)
    if not fraction and split == "heldout":
        return

    def select():
        mixture = Mixture(config, 0, split)
        chosen = [c.select_grids(np.arange(c.sentences_per_epoch))[0].tolist() for c in mixture.components]
        codes = [c.sentences(np.arange(3)).tolist() for c in mixture.components]
        return chosen, codes, [(c.num_scenes, c.num_excluded) for c in mixture.components]

    opened = Mixture(config, 0, split).stores
    kinds = [None if store.kinds is None else len(store.kinds) for store in opened]
    result = select()
    for store in opened:
        monkeypatch.setattr(store, "kinds", None)
    assert select() == result
    assert None not in kinds


@given(st.lists(st.lists(st.booleans(), max_size=200), max_size=4))
def test_rank_index_selects_by_predicate(parts):
    arrays = [np.array(part, bool) for part in parts]
    scenes = RankIndex(arrays, lambda entries: entries)
    expected = np.flatnonzero(np.concatenate([np.zeros(0, bool), *arrays]))
    assert len(scenes) == len(expected)
    np.testing.assert_array_equal(scenes.select(np.arange(len(expected))), expected)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize(
    "recipe", [Category(images=3), VaryingPairs("rgb", ("edges", "segmentation"), shots=3, same_class=True)]
)
def test_sentences_of_one_class_have_no_repeats(make_store, new_scenes, recipe, shuffle):
    path = make_store(new_scenes([(1, 3)] * 41))  # classes −1, 0, 1 in turn
    config = MixtureConfig({"a": ComponentConfig(recipe)}, (path,), 0.0, shuffle=shuffle)
    component = Mixture(config, 0).components[0]
    store = Store(path)
    assert component.sentences_per_epoch == 4 + 4
    for epoch in range(2):
        scenes = component.select_grids(np.arange(8) + 8 * epoch)[0][:, :: recipe.num_grids // 3]
        classes = store.index["class_id"][scenes]
        assert (classes == classes[:, :1]).all()
        assert (classes >= 0).all()
        assert len(np.unique(scenes)) == 24
    assert not np.array_equal(component.select_grids(np.arange(8))[0][:, :: recipe.num_grids // 3], scenes)
    assert component.num_excluded == 14  # those without a class


def test_record_of_a_recipe_has_the_keys_of_earlier_versions(make_store, new_scenes):
    path = make_store(new_scenes([(1, 1)] * 41))
    for options in ({}, {"same_class": True}):
        config = MixtureConfig({"a": ComponentConfig(Pairs(shots=2, **options))}, (path,), 0.0)
        recipe = Mixture(config, 0).record()["components"]["a"]["recipe"]
        assert recipe == {"kind": "pairs", "input": "rgb", "target": "segmentation", "shots": 2, **options}


def test_small_classes_are_excluded_and_counted(make_store, new_scenes):
    path = make_store(new_scenes([(1, 0)] * 5))  # class 0 has two scenes, class 1 has one
    config = MixtureConfig({"category": ComponentConfig(Category(images=2))}, (path,), 0.0)
    component = Mixture(config, 0).components[0]
    assert (component.sentences_per_epoch, component.num_scenes, component.num_excluded) == (1, 2, 3)
    with pytest.raises(UserError, match=r"no class has 3 .*train scenes in .* 2"):
        Mixture(MixtureConfig({"category": ComponentConfig(Category(images=3))}, (path,), 0.0), 0)


def test_split_without_any_class_is_named(make_store, new_scenes):
    groups = sorted(("a", "b", "c"), key=group_hash)  # scene 0, the one without a class, has the lowest hash
    path = make_store(new_scenes([(1, 0)] * 3, groups=groups))
    fraction = (group_hash(groups[0]) + group_hash(groups[1])) / 2**65
    config = MixtureConfig({"category": ComponentConfig(Category(images=2))}, (path,), fraction)
    with pytest.raises(UserError, match=r"no class has 2 .*heldout scenes in .*, the largest has 0"):
        Mixture(config, 0, "heldout")


def test_repetitions_count_copies_and_are_limited(make_store, new_scenes):
    path = make_store(new_scenes([(1, 0)] * 12, groups=[f"group {i // 3}" for i in range(12)]))
    components = {"single": ComponentConfig(Single(), max_repetitions=6.0)}
    rows = Rows(Mixture(MixtureConfig(components, (path,), 0.0), 0), Vocabulary.for_codes(16), 6, 4)
    component = rows.mixture.components[0]
    assert component.scenes_per_group == 3
    assert component.repetitions(24) == 6
    rows.batch(4)  # sentences 16 to 20, and a token of the next
    with pytest.raises(UserError, match=r"single\.max_repetitions=6 .* 29 sentences are 2\.417 epochs .* 7\.25 times"):
        rows.batch(6)
    with pytest.raises(UserError, match=r"max_repetitions=6 .* 256 sentences"):
        rows.check_repetitions(50)


def test_repetitions_of_many_scenes_come_from_a_sample(make_store, monkeypatch):
    monkeypatch.setattr(sentences, "_SAMPLE", 8)  # of 24 scenes: groups whose hash is divisible by 3
    groups = [3 + i % 2 if i < 8 else 4 + 3 * i for i in range(24)]
    scenes = [Scene(f"{i}", "", ("rgb",), np.zeros((1, 1, 4), np.uint16), group) for i, group in enumerate(groups)]
    mixture = Mixture(MixtureConfig({"single": ComponentConfig(Single())}, (make_store(scenes),), 0.0), 0)
    assert mixture.components[0].scenes_per_group == 4


def test_weigh_by_codes(make_store):
    path = make_store([(3, 0)] * 12)
    components = {
        "single": ComponentConfig(Single()),
        "video": ComponentConfig(Video(frames=3, strides=(1,))),
    }
    mixture = Mixture(MixtureConfig(components, (path,), 0.0, weigh_by="codes"), 0)
    np.testing.assert_allclose(mixture.shares, [0.75, 0.25])
    assert mixture.identity() != Mixture(MixtureConfig(components, (path,), 0.0), 0).identity()


def test_identity_covers_everything_that_changes_the_order(make_store):
    path = make_store([(3, 0)] * 12)

    def identity(seed=0, **options):
        return Mixture(MixtureConfig({"single": ComponentConfig(Single())}, (path,), **options), seed).identity()

    assert identity() == identity(allow_missing=True)
    changed = [{"seed": 1}, {"packing": "whole"}, {"shuffle": "blocks"}, {"heldout_fraction": 0.3}]
    assert len({identity(), *(identity(**change) for change in changed)}) == 5


def test_missing_stores_are_reported_together_or_skipped(make_store, tmp_path, caplog):
    components = {
        "gone": ComponentConfig(Single(), store=(str(tmp_path / "gone"),)),
        "here": ComponentConfig(Single(), store=(make_store([(1, 0)] * 9),)),
        "unset": ComponentConfig(Single()),
    }
    with pytest.raises(UserError, match=r"gone \(.*/gone doesn't exist.*; unset \(no store"):
        Mixture(MixtureConfig(components), 0)
    mixture = Mixture(MixtureConfig(components, allow_missing=True), 0)
    assert [component.name for component in mixture.components] == ["here"]
    assert mixture.shares.tolist() == [1.0]
    assert "skipped component gone" in caplog.text


# Real processes: the fingerprint is the same for any number of them.
ARGUMENTS = ("--config=tests/configs/tiny_lvm.py", "--config.batch_size=8", "--config.model.context=40")


@pytest.fixture
def store_flag(make_store):
    return f"--config.data.store={make_store([(4, 1)] * 20 + [(6, 2)] * 20)}"


@pytest.fixture
def flags(store_flag):
    off = [f"--config.data.components.{name}.weight=0" for name in ("depth", "edges")]
    return [*ARGUMENTS, store_flag, *off, "--config.data.components.single.weight=1"]


def fingerprint(flags, processes=1, **options):
    """The last line of `lvm fingerprint` on `processes` processes, which must all print it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "lvm.fingerprint",
        *flags,
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    started = []
    for number in range(processes):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        if processes > 1:
            environment |= {"LVM_COORDINATOR": f"localhost:{port}", "LVM_NUM_PROCESSES": str(processes)}
            environment["LVM_PROCESS_ID"] = str(number)
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    (last,) = {output.splitlines()[-1] for output in outputs}
    return last


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_fingerprint_is_independent_of_processes_and_workers(flags, packing, tmp_path):
    flags = [*flags, f"--config.data.packing={packing}"]
    whole = fingerprint(flags, batches=200)
    assert whole == fingerprint(flags, processes=2, batches=200, workers=1)
    assert whole == fingerprint(flags, processes=4, batches=200)
    assert whole == fingerprint(flags, batches=200, workers=2)
    # Stopped after 57 steps on one process, then on two, then on four.
    first, second = tmp_path / "first", tmp_path / "second"
    fingerprint(flags, batches=57, out=first)
    rest = fingerprint(flags, processes=2, start=57, batches=143, out=second)
    assert rest == fingerprint(flags, processes=4, start=57, batches=143, workers=1)
    assert hashlib.sha256(second.read_bytes()).hexdigest() == rest
    assert hashlib.sha256(first.read_bytes() + second.read_bytes()).hexdigest() == whole


def test_fingerprint_hashes_the_tokens(flags, store_flag):
    rows = Rows(
        Mixture(
            MixtureConfig(
                {
                    "segmentation": ComponentConfig(Pairs(shots=3), 0.30),
                    "single": ComponentConfig(Single()),
                    "video": ComponentConfig(Video(frames=4, strides=(1,)), 0.40),
                },
                (store_flag.partition("=")[2],),
                heldout_fraction=0.25,
            ),
            seed=0,
        ),
        Vocabulary.for_codes(16),
        40,
        8,
    )
    expected = hashlib.sha256(b"".join(rows.batch(step)["tokens"].astype("<i4").tobytes() for step in (2, 3, 4)))
    assert fingerprint(flags, start=2, batches=3) == expected.hexdigest()


def test_fingerprint_refuses_0_batches(flags):
    assert "--batches=0" in run("lvm.fingerprint", *flags, "--batches=0", code=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_prefetch_yields_steps_in_order(make_store, workers):
    path = make_store([(1, 0)] * 30)
    mixture = Mixture(MixtureConfig({"single": ComponentConfig(Single())}, (path,)), 0)
    rows = Rows(mixture, Vocabulary.for_codes(16), 24, 4)
    yielded = list(prefetch_batches(rows.batch, 3, 9, workers))
    assert len(yielded) == 6
    for step, batch in enumerate(yielded, 3):
        for name, values in rows.batch(step).items():
            np.testing.assert_array_equal(batch[name], values)


def test_prefetch_raises_errors_of_reading(make_store):
    path = make_store([(1, 0)] * 30)
    components = {"single": ComponentConfig(Single(), max_repetitions=1.0)}
    rows = Rows(Mixture(MixtureConfig(components, (path,), 0.0), 0), Vocabulary.for_codes(16), 24, 4)
    with pytest.raises(UserError, match="max_repetitions"):
        list(prefetch_batches(rows.batch, 0, 9))
    with pytest.raises(UserError, match="workers=-1"):
        next(prefetch_batches(rows.batch, 0, 1, workers=-1))
