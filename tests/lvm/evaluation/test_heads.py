"""Heads on frozen features, against scikit-learn and their formulas."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.preprocessing
from scipy.special import softmax

from lvm.evaluation import heads


def samples(n=300, D=8, classes=3, seed=0):
    """Correlated features, and labels that depend on them with noise."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, D)) @ rng.standard_normal((D, D))).astype(np.float32)
    return heads.standardize(x)(x), (x[:, :classes] + rng.gumbel(size=(n, classes))).argmax(1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_logistic_head_equals_scikit_learn(classes, l2):
    x, labels = samples(classes=classes)
    head, wide = heads.fit_logistic(x, labels, l2), x.astype(np.float64)
    C = (2 if classes == 2 else 1) / (l2 * len(x))
    # Its own L-BFGS stops at 1e-6.
    expected = sklearn.linear_model.LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(wide, labels)
    np.testing.assert_allclose(softmax(head.scores(x), 1), expected.predict_proba(wide), atol=1e-6)
    if classes > 2:
        np.testing.assert_allclose(head.weights.T, expected.coef_, atol=1e-6)
    assert (head(x) == expected.predict(wide)).all()


def test_logistic_head_ignores_absent_classes():
    x, labels = samples()
    head = heads.fit_logistic(x, labels * 2 + 1, 0.01)
    np.testing.assert_allclose(head.weights, heads.fit_logistic(x, labels, 0.01).weights)
    assert set(head(x)) == {1, 3, 5}
    assert set(heads.fit_logistic(x, np.full(len(x), 4), 0.01)(x)) == {4}


def test_ridge_head_equals_scikit_learn():
    x, _ = samples()
    y = x[:, 0] - 2 * x[:, 3] + np.random.default_rng(1).standard_normal(len(x)) + 5
    head = heads.fit_ridge(x + 1, y, 0.02)  # features that aren't centered, too
    expected = sklearn.linear_model.Ridge(alpha=0.02 * len(x)).fit((x + 1).astype(np.float64), y)
    np.testing.assert_allclose(head.weights[:, 0], expected.coef_, atol=1e-6)
    np.testing.assert_allclose(head(x + 1), expected.predict((x + 1).astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_heads_of_few_samples_equal_scikit_learn(classes):
    x, labels = samples(n=30, D=90, classes=classes)
    wide, C = x.astype(np.float64), (2 if classes == 2 else 1) / (0.01 * len(x))
    expected = sklearn.linear_model.LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(wide, labels)
    new = np.random.default_rng(1).standard_normal((50, 90))
    head = heads.fit_logistic(x, labels, 0.01)
    np.testing.assert_allclose(softmax(head.scores(new), 1), expected.predict_proba(new), atol=1e-6)
    expected = sklearn.linear_model.Ridge(alpha=0.01 * len(x)).fit(wide + 1, labels.astype(float))
    np.testing.assert_allclose(
        heads.fit_ridge(wide + 1, labels.astype(float), 0.01)(new), expected.predict(new), atol=1e-6
    )


def test_heads_of_few_samples_need_no_square_matrix():
    x, labels = samples(n=12, D=1000)
    tracemalloc.start()
    heads.fit_logistic(x, labels, 0.01)
    heads.fit_ridge(x, labels.astype(float), 0.01)
    assert tracemalloc.get_traced_memory()[1] < 1000**2 * 8 / 4
    tracemalloc.stop()


def test_standardize_equals_scikit_learn():
    x = np.random.default_rng(0).normal(3, 2, (50, 4, 6)).astype(np.float32)
    flat = x.reshape(-1, 6)
    expected = sklearn.preprocessing.StandardScaler().fit_transform(flat.astype(np.float64))
    np.testing.assert_allclose(heads.standardize(x)(flat), expected, atol=1e-5)
    x[..., 2] = 0.1
    np.testing.assert_array_equal(heads.standardize(x)(flat + 1)[:, 2], 0)  # of fitted samples that are all alike


def test_neighbors_vote_by_similarity():
    fitted = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [-1, 0]], np.float32) * [[2], [1], [5], [1]]
    labels, x = np.array([0, 1, 1, 2]), np.array([[3.0, 0]], np.float32)
    # Weights e^(1/T), e^(.8/T), e^(.6/T): one near sample outvotes two at a low temperature alone.
    assert heads.predict_neighbors(fitted, labels, x, 3, 0.07) == [0]
    assert heads.predict_neighbors(fitted, labels, x, 3, 1.0) == [1]
    assert heads.predict_neighbors(fitted, labels, -x, 1) == [2]


def test_attentive_head_equals_its_formula():
    rng = np.random.default_rng(0)
    B, N, D, H, C = 5, 6, 8, 2, 3
    raw = rng.normal(1, 3, (B, N, D)).astype(np.float32)
    params = heads.init_attentive(rng, D, H, C)
    params = params._replace(query=params.query * 100)  # so that weights differ
    x = (raw - raw.mean((0, 1))) / np.sqrt(raw.var((0, 1)) + 1e-6)  # BatchNorm1d(eps=1e-6, affine=False)
    keys = (x @ params.key.reshape(D, D)).reshape(B, N, H, D // H)
    values = (x @ params.value.reshape(D, D)).reshape(B, N, H, D // H)
    logits = np.einsum("bnhd,hd->bhn", keys, params.query) / np.sqrt(D // H)
    pooled = np.einsum("bhn,bnhd->bhd", softmax(logits, -1), values).reshape(B, D)
    expected = pooled @ params.out
    np.testing.assert_allclose(heads.attend(params, jnp.array(heads.standardize(raw)(raw))), expected, atol=1e-5)
    assert (heads.AttentiveHead(heads.standardize(raw), params)(raw) == expected.argmax(1)).all()


def test_attentive_head_learns_what_a_mean_hides():
    """The class is the sign of a feature at the one marked code."""
    rng = np.random.default_rng(0)
    n, N, D = 400, 8, 4
    x = rng.standard_normal((n, N, D)).astype(np.float32)
    marked = rng.integers(N, size=n)
    x[..., 0] = 0
    x[np.arange(n), marked, 0] = 3
    labels = (x[np.arange(n), marked, 1] > 0).astype(int)
    fit, test = np.arange(300), np.arange(300, n)
    head = heads.fit_attentive(x, fit, labels, 2, 2, 800, 0)
    assert np.mean(head(x[test]) == labels[test]) > 0.8
    pooled = x.mean(1)
    assert np.mean(heads.fit_logistic(pooled[fit], labels[fit], 1e-3)(pooled[test]) == labels[test]) < 0.75
