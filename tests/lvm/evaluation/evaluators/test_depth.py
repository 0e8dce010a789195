"""Depth figures with and without median scaling."""

import numpy as np

from lvm.data.streams.codecs import Depth, Image
from lvm.evaluation.evaluators.depth import DepthTask


def test_depth_of_perfect_answers(make_context, make_heldout_scenes, knows):
    scenes = make_heldout_scenes(4, streams=("rgb", "depth"))
    context = make_context(scenes, {"rgb": Image(), "depth": Depth(1.0, 5.0, "m")}, knows(scenes, "depth"))
    figures = {figure.name: figure for figure in DepthTask(num_queries=6).run(context)[0]}
    for suffix in ("", "_scaled"):
        values = [figures[name + suffix].estimate.value for name in ("rmse", "abs_rel", "delta1")]
        np.testing.assert_allclose(values, [0, 0, 1])
    assert figures["rmse"].text.startswith("RMSE in m;")
    assert "median scaling" in figures["abs_rel_scaled"].text
    assert not figures["abs_rel"].higher_is_better
    assert figures["abs_rel"].baselines["copied example"].value > 0.1
