"""Fréchet distance of feature distributions, from statistics of fixed size that batches are added to."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import scipy.linalg
from etils import epath
from jaxtyping import Float

from lvm.common import files
from lvm.common.errors import UserError

EVALUATOR = "clean-fid's: TensorFlow's Inception of 2015-12-05, images resized to 299 by antialiased bicubic in float32"


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, in float64."""

    def __init__(self, num_features: int):
        self.count = 0
        self._sum, self._products = np.zeros(num_features), np.zeros((num_features, num_features))

    def add(self, features: Float[np.ndarray, "n D"]) -> None:
        """Adds a batch."""
        features = features.astype(np.float64)
        self.count += len(features)
        self._sum += features.sum(0)
        self._products += features.T @ features

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        return self._sum / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Sample covariance, divided by count − 1."""
        return (self._products - np.outer(self._sum, self.mean)) / (self.count - 1)

    def save(self, path: epath.PathLike) -> None:
        """Writes a file that `load` reads, atomically."""
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, count=self.count, sum=self._sum, products=self._products)
        files.write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: epath.PathLike) -> FeatureStatistics:
        """Reads the statistics of a file.

        Raises:
          UserError: the file isn't one of `save`.
        """
        try:
            with np.load(io.BytesIO(epath.Path(path).read_bytes())) as arrays:
                statistics = cls(len(arrays["sum"]))
                statistics.count = int(arrays["count"])
                statistics._sum, statistics._products = arrays["sum"], arrays["products"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not statistics of features ({error}); remove it") from error
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μ₁ − μ₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½) (Heusel et al., arXiv 1706.08500).

    The trace of the root is that of (R' C₂ R)^½ with C₁ = R R', which is symmetric: exact where the covariances are
    singular, as those of fewer images than features are. NaN of fewer than two images.
    """
    if min(a.count, b.count) < 2:
        return float("nan")
    values, vectors = scipy.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    eigenvalues = scipy.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root)
