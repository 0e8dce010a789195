"""Measures a tokenizer over batches of images: PSNR, SSIM, LPIPS and FID of reconstructions, use of the codebook."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvm.common import statistics
from lvm.evaluation.figures import Estimate, Figure
from lvm.evaluation.image_metrics import LPIPS as LPIPS_METRIC
from lvm.evaluation.image_metrics import PSNR, SSIM
from lvm.model.nnx_utils import Params
from tokenizer.code_usage import expected_of_uniform
from tokenizer.encoding_progress import EncodingProgress
from tokenizer.evaluation import fid, inception
from tokenizer.evaluation.fid import FeatureStatistics
from tokenizer.evaluation.image_batches import ImageBatch, ImageBatches
from tokenizer.evaluation.running import Examples, RunningMean, bootstrap_weights, image_hash
from tokenizer.losses.ssim import WINDOW, ssim
from tokenizer.objective import to_float, to_uint8
from tokenizer.perceptual.lpips import LPIPS
from tokenizer.pretrained import DataParallel, Tokenizer

FID_STREAM = "rgb"  # the features are of photographs
_MAX_PENDING = 1  # batches on the devices while the next one is read
_OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float32"}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Weights of the networks that compare images; None leaves their figures out.

    Attributes:
      lpips: of `tokenizer.perceptual.lpips`.
      inception: of `tokenizer.evaluation.inception`.
    """

    lpips: Params | None = None
    inception: Params | None = None


@dataclasses.dataclass
class _Pending:
    batch: ImageBatch
    decoded: jax.Array  # uint8 [B, R, R, 3]
    results: dict[str, jax.Array]


class Measurement:
    """One pass of a tokenizer over images. Its memory doesn't grow with their number.

    Args:
      images: FID statistics of the images themselves; None measures them, too, as the attribute `image_features`.
      num_examples: images kept of the best, the worst and a sample.

    Attributes:
      num_images: by stream.
      num_skipped: data that couldn't be read.
      counts: of each code, by stream: int64 [K].
      examples: of all streams.
    """

    def __init__(
        self, tokenizer: Tokenizer, networks: Networks, image_features: FeatureStatistics | None, num_examples: int
    ):  # fmt: skip
        config = tokenizer.config
        self.tokenizer = tokenizer
        self.num_images: collections.Counter[str] = collections.Counter()
        self.num_skipped, self._images_hash = 0, 0
        self.counts: dict[str, np.ndarray] = {}
        self.examples = Examples(num_examples)
        self._has_ssim, self._has_lpips = config.resolution >= WINDOW, networks.lpips is not None
        self._means = collections.defaultdict[str, RunningMean](RunningMean)
        self._num_codes, self._num_flips = 0, 0
        other = dataclasses.replace(config, compute_dtype=_OTHER_DTYPE[config.compute_dtype])
        self._other = Tokenizer(other, tokenizer.preprocess, tokenizer.params)
        params = {} if networks.lpips is None else {"lpips": networks.lpips}
        self._compare = DataParallel(self._compare_images, params)
        self._features: DataParallel | None = None
        self._is_measuring_images = image_features is None
        if networks.inception is not None:
            self._features = DataParallel(inception.features, networks.inception)
            self.image_features = image_features or FeatureStatistics(inception.NUM_FEATURES)
            self._decoded_features = FeatureStatistics(inception.NUM_FEATURES)

    def run(self, batches: ImageBatches) -> None:
        """Measures batches, whose sizes are multiples of the tokenizer's devices."""
        pending: collections.deque[_Pending] = collections.deque()
        for batch in batches:
            pending.append(self._dispatch(batch))
            if len(pending) > _MAX_PENDING:
                self._collect(pending.popleft(), batches.progress)
        while pending:
            self._collect(pending.popleft(), batches.progress)
        self.num_skipped = batches.num_skipped

    def _dispatch(self, batch: ImageBatch) -> _Pending:
        tokenizer, devices = self.tokenizer, self.tokenizer.num_devices
        codes = tokenizer.encoder(batch.images, devices)
        decoded = to_uint8(tokenizer.decoder(codes.astype(jnp.int32), devices))
        results = {"codes": codes, "other_codes": self._other.encoder(batch.images, devices)}
        pairs = jnp.stack([decoded, batch.images], 1)
        results |= self._compare(pairs, devices)
        if self._features and batch.stream == FID_STREAM:
            results["decoded_features"] = self._features(decoded, devices)
            if self._is_measuring_images:
                results["image_features"] = self._features(batch.images, devices)
        return _Pending(batch, decoded, results)

    def _compare_images(self, params: Params, pairs: jax.Array) -> dict[str, jax.Array]:
        """Metrics of pairs of reconstruction and image, uint8 [B, 2, R, R, 3], by name."""
        decoded, images = to_float(pairs[:, 0]), to_float(pairs[:, 1])
        values = {PSNR.name: statistics.psnr(decoded, images)}
        if self._has_ssim:
            values[SSIM.name] = ssim(decoded, images)
        if "lpips" in params:
            values[LPIPS_METRIC.name] = LPIPS().distances(params["lpips"], decoded, images, "float32")
        return values

    def _collect(self, pending: _Pending, progress: EncodingProgress) -> None:
        batch, num = pending.batch, len(pending.batch.keys)
        with progress.waiting("device"):
            results = {name: np.asarray(array)[:num] for name, array in pending.results.items()}
        self.num_images[batch.stream] += num
        codes, other = results.pop("codes"), results.pop("other_codes")
        counts = np.bincount(codes.ravel(), minlength=self.tokenizer.config.codebook_size)
        self.counts[batch.stream] = self.counts.get(batch.stream, 0) + counts
        self._num_codes, self._num_flips = self._num_codes + codes.size, self._num_flips + np.sum(codes != other)
        if "decoded_features" in results:
            self._decoded_features.add(results.pop("decoded_features"))
        if "image_features" in results:
            self.image_features.add(results.pop("image_features"))
        self._images_hash += sum(image_hash(batch.stream, key) for key in batch.keys)
        weights = bootstrap_weights(batch.groups)
        for name, values in results.items():
            self._means[f"{name}/{batch.stream}"].add(values, weights)
        fetch = lambda: np.asarray(pending.decoded)  # noqa: E731
        self.examples.add(batch.stream, batch.keys, results[PSNR.name], batch.images, fetch)

    def is_paired(self, other: "Measurement") -> bool:
        """Whether both measured the same images, equally preprocessed."""
        preprocess = [each.tokenizer.preprocess.to_json() for each in (self, other)]
        return preprocess[0] == preprocess[1] and self._images_hash == other._images_hash

    def missing(self) -> list[str]:
        """Figures that are left out, and what they need: a sentence each."""
        side, num_rgb, reasons = self.tokenizer.config.resolution, self.num_images[FID_STREAM], []
        if not self._has_ssim:
            reasons.append(f"SSIM needs images of {WINDOW} × {WINDOW} pixels; these have {side} × {side}.")
        if not self._has_lpips:
            reasons.append("LPIPS needs --lpips_weights and --lpips_heads.")
        if not self._features:
            reasons.append("FID needs --inception_weights.")
        elif num_rgb < 2:
            reasons.append(f"FID needs two images of the stream {FID_STREAM}; there is {num_rgb or 'none'}.")
        return reasons

    def figures(self) -> list[Figure]:
        """All figures, of at least one image."""
        figures = [
            Figure(
                name,
                mean.estimate(),
                f"{metric.name.upper()} of reconstructions, mean over images",
                metric.unit,
                metric.higher_is_better,
            )
            for metric in (PSNR, SSIM, LPIPS_METRIC)
            for name, mean in self._means.items()
            if name.partition("/")[0] == metric.name
        ]
        if self._features and self.num_images[FID_STREAM] > 1:
            value = fid.frechet_distance(self.image_features, self._decoded_features)
            text = f"reconstruction FID of {self.num_images[FID_STREAM]:,} images by {fid.EVALUATOR}"
            figures.append(Figure(f"rfid/{FID_STREAM}", Estimate(value), text, "", False))
        figures += self._usage_figures("", sum(self.counts.values()))
        if len(self.counts) > 1:
            for stream, counts in self.counts.items():
                figures += self._usage_figures(f"/{stream}", counts)
        other = self._other.config.compute_dtype
        text = f"codes that change when the encoder computes in {other} instead of {_OTHER_DTYPE[other]}"
        flips = Estimate(float(self._num_flips / self._num_codes))
        return [*figures, Figure("bfloat16_flips", flips, text, "%", False)]

    def _usage_figures(self, suffix: str, counts: Any) -> list[Figure]:
        num_codes, total = len(counts), int(counts.sum())
        usage, perplexity = expected_of_uniform(num_codes, total)
        rows = (
            ("codebook_usage", np.count_nonzero(counts) / num_codes, f"share of {num_codes:,} codes that occur", "%"),
            ("codebook_usage_of_uniform", usage, "expected of as many uniformly distributed codes", "%"),
            ("codebook_perplexity", statistics.perplexity(counts), f"effective codes, over {total:,} codes", "count"),
            ("codebook_perplexity_of_uniform", perplexity, "expected of as many uniformly distributed codes", "count"),
        )
        return [Figure(f"{name}{suffix}", Estimate(float(x)), text, unit, None) for name, x, text, unit in rows]
