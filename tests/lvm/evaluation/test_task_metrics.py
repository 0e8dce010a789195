"""Metrics of normals, boxes, keypoints and restored images, against public implementations and by hand."""

import numpy as np
import pycocotools.mask
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from lvm.evaluation import metrics

WITHIN = (11.25, 22.5, 30.0)


def tilted(degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.sin(radians), np.zeros_like(radians), np.cos(radians)], axis=-1)


def test_normal_errors_of_known_angles():
    angles = np.array([[[0.0, 10.0], [20.0, 50.0]], [[5.0, 5.0], [90.0, 180.0]]])
    valid = np.array([[[True, True], [True, True]], [[True, True], [False, False]]])
    mean, shares = metrics.normal_errors(tilted(angles), tilted(np.zeros((2, 2, 2))), valid, WITHIN)
    np.testing.assert_allclose(mean, [20, 5])
    np.testing.assert_allclose(shares, [[0.5, 1], [0.75, 1], [0.75, 1]])


def test_normals_without_a_valid_pixel_have_no_value():
    flat = tilted(np.zeros((1, 1, 1)))  # one pixel
    mean, shares = metrics.normal_errors(flat, flat, np.zeros((1, 1, 1), bool), WITHIN)
    assert np.isnan(mean).all()
    assert np.isnan(shares).all()
    assert metrics.normal_errors(flat, flat, np.ones((1, 1, 1), bool), WITHIN)[0].tolist() == [0.0]


BOXES = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 20)] * 2)


@given(BOXES, BOXES)
def test_box_iou_equals_pycocotools(a, b):
    corners = [(x, y, x + width, y + height) for x, y, width, height in (a, b)]
    expected = pycocotools.mask.iou(np.array([a], float), np.array([b], float), [0]).item()
    assert metrics.box_iou(*corners) == pytest.approx(expected, abs=1e-12)


def test_largest_box_is_of_the_largest_region():
    mask = np.zeros((8, 9), bool)
    mask[1:3, 1:3] = True
    mask[4:7, 5:8] = True
    mask[7, 8] = True  # touches by a corner only
    assert metrics.largest_box(mask) == (5, 4, 8, 7)
    assert metrics.largest_box(np.zeros((3, 3), bool)) is None
    assert metrics.largest_box(np.ones((1, 1), bool)) == (0, 0, 1, 1)
    assert metrics.box_iou(None, (0, 0, 1, 1)) == 0.0


def points(*positions):
    return np.array(positions, float).reshape(-1, 2)


def test_keypoint_shares_by_hand():
    truth = [points((0, 0)), points((10, 20)), points()]  # the longer side of the box is 20: 2 pixels count
    answers = [points((0, 2)), points((10, 22.1)), points((5, 5))]
    assert metrics.keypoint_shares(answers, truth, 0.1) == (0.5, pytest.approx(1 / 3))
    assert metrics.keypoint_shares(truth, truth, 0.1) == (1.0, 1.0)


def test_keypoints_are_matched_one_to_one():
    truth = [points((0, 0), (1, 0)), points((0, 20))]
    one_answer = [points((0.5, 0)), points()]
    assert metrics.keypoint_shares(one_answer, truth, 0.1) == (pytest.approx(1 / 3), 1.0)
    crossed = [points((1, 0), (0, 1.5)), points((0, 20))]  # the second must take the first's nearest
    assert metrics.keypoint_shares(crossed, truth, 0.1) == (1.0, 1.0)


@pytest.mark.parametrize("truth", [[points()], [points((3, 3))], [points((3, 3), (3, 3))]])
def test_keypoints_without_a_size_have_no_value(truth):
    assert np.isnan(metrics.keypoint_shares([points((3, 3))], truth, 0.1)).all()


def test_no_answered_keypoint_has_no_precision():
    pck, precision = metrics.keypoint_shares([points()], [points((0, 0), (0, 9))], 0.1)
    assert pck == 0.0
    assert np.isnan(precision)


def reference_ssim(a, b):
    """Wang et al. (2004), written out for one channel; borders of half a window are left out."""
    blur = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)  # noqa: E731
    a, b = a.astype(float), b.astype(float)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index[5:-5, 5:-5].mean()


def test_ssim_equals_its_definition():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)
    images = np.clip(truth + rng.normal(0, 40, truth.shape), 0, 255).astype(np.uint8)
    expected = [
        np.mean([reference_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(images, truth, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(images, truth), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.ssim(truth, truth), 1)
