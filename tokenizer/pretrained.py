"""A trained tokenizer, loaded: images to codes and back in two lines."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lvm.config import from_config_dict, to_json
from lvm.data.preprocess import Preprocess
from lvm.data.sources.readers import UnreadableError, decode_picture
from lvm.errors import UserError
from lvm.module import Params, abstract, merge
from lvm.training.checkpoint import load_params
from lvm.training.workdir import read_record
from tokenizer.objective import to_float, to_uint8
from tokenizer.vqgan import VQGAN, VQGANConfig

BATCH = 8  # images a device call; every call has this many, padded, so codes can't depend on how many came


class Tokenizer:
    """Images ↔ codes.

    Attributes:
      config: its `VQGANConfig`.
      preprocess: how any picture becomes an image of its size; part of what the codes mean.
      params: the weights, a nested dict.
      step: the training step of the weights.
    """

    def __init__(self, config: VQGANConfig, preprocess: Preprocess, params: Params, step: int = 0):
        self.config, self.preprocess, self.params, self.step = config, preprocess, params, step
        graphdef, _ = abstract(lambda rngs: VQGAN(config, rngs))
        self._encode = jax.jit(lambda params, x: merge(graphdef, params).encode(to_float(x)))
        self._encode_latents = jax.jit(lambda params, x: merge(graphdef, params).encode_latents(x))
        self._decode = jax.jit(lambda params, codes: merge(graphdef, params).decode_float(codes))

    @classmethod
    def load(cls, folder: epath.PathLike, dtype: str | None = None) -> Tokenizer:
        """Loads a model folder.

        Args:
          folder: the workdir of a run, of which the newest checkpoint is taken.
          dtype: compute type, "float32" or "bfloat16"; the training's by default.

        Raises:
          UserError: not a tokenizer's folder, no checkpoint in it, or an unknown dtype.
        """
        record = read_record(folder, "tokenizer", ("config", "preprocess"))
        where = f"{folder}/config.json: config"
        config = from_config_dict(VQGANConfig, record["config"]["model"], f"{where}.model")
        if dtype:
            config = dataclasses.replace(config, compute_dtype=dtype)
        preprocess = Preprocess.from_json(record["preprocess"])
        _, shapes = abstract(lambda rngs: VQGAN(config, rngs))
        params, step = load_params(folder, shapes)
        return cls(config, preprocess, params, step)

    @property
    def codes_per_image(self) -> int:
        return self.config.num_codes_per_image

    def identity(self) -> dict[str, Any]:
        """What the meaning of a code depends on, as JSON: a hash of the weights, the network, the preprocessing."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.params):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return {
            "weights": digest.hexdigest(),
            "model": {key: value for key, value in to_json(self.config).items() if key != "compute_dtype"},
            "preprocess": self.preprocess.to_json(),
            "grid": list(self.config.grid),
            "num_codes": self.config.codebook_size,
        }

    def encode(self, images: Any, batch_size: int = BATCH) -> np.ndarray:
        """Images uint8 [B, R, R, 3] → codes int32 [B, N] in raster order.

        Args:
          images: of the tokenizer's size; `t.preprocess` makes them of any picture.
          batch_size: images a device call; each call has as many, padded.

        Raises:
          UserError: another shape or type.
        """
        images = self._checked(images)
        return self._in_batches(lambda x: self._encode(self.params, x), images, batch_size)

    def encode_latents(self, images: Any, batch_size: int = BATCH) -> np.ndarray:
        """Images uint8, or float in [0, 1], [B, R, R, 3] → latents float32 [B, N, C] before quantization."""
        images = np.asarray(images)
        if not np.issubdtype(images.dtype, np.floating):
            images = self._checked(images).astype(np.float32) / 255
        self._check_shape(images)
        images = images.astype(np.float32)
        latents = self._in_batches(lambda x: self._encode_latents(self.params, x), images, batch_size)
        return latents.reshape(len(images), self.codes_per_image, -1)

    def decode_float(self, codes: Any, batch_size: int = BATCH) -> np.ndarray:
        """Codes int [B, N] → float32 [B, R, R, 3], not clipped.

        Raises:
          UserError: another shape or type, or a code outside the codebook.
        """
        codes, N, K = np.asarray(codes), self.codes_per_image, self.config.codebook_size
        if codes.ndim != 2 or codes.shape[1] != N or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"codes: {codes.dtype} {list(codes.shape)}, wanted integers [B, {N}]")
        if codes.size and (codes.min() < 0 or codes.max() >= K):
            raise UserError(f"codes: from {codes.min()} to {codes.max()}, the codebook has 0..{K - 1}")
        return self._in_batches(lambda x: self._decode(self.params, x), codes.astype(np.int32), batch_size)

    def decode(self, codes: Any, batch_size: int = BATCH) -> np.ndarray:
        """Codes int [B, N] → images uint8 [B, R, R, 3]: round(255·clip(x, 0, 1))."""
        return np.asarray(to_uint8(jnp.asarray(self.decode_float(codes, batch_size))))

    def encode_async(self, images: np.ndarray) -> jax.Array:
        """One device call without waiting for it: uint8 [B, R, R, 3] → codes int32 [B, N] still on the device."""
        return self._encode(self.params, images)

    def read(self, path: epath.PathLike) -> np.ndarray:
        """A picture file as an image of the tokenizer's size, uint8 [R, R, 3].

        Raises:
          UserError: the file is missing or not a picture.
        """
        try:
            return self.preprocess(decode_picture(pathlib.Path(path)))
        except (UnreadableError, UserError) as error:
            raise UserError(f"{path}: can't be read as an image: {error}") from error

    def _checked(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise UserError(f"images: {images.dtype}, wanted uint8 [B, R, R, 3]")
        self._check_shape(images)
        return images

    def _check_shape(self, images: np.ndarray) -> None:
        side = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise UserError(
                f"images: {list(images.shape)}, wanted [B, {side}, {side}, 3]; "
                "t.preprocess(image) makes such an image of any picture"
            )

    @staticmethod
    def _in_batches(run: Callable[[np.ndarray], jax.Array], items: np.ndarray, batch_size: int) -> np.ndarray:
        parts = []
        for start in range(0, max(len(items), 1), batch_size):
            part = items[start : start + batch_size]
            padding = [(0, batch_size - len(part))] + [(0, 0)] * (items.ndim - 1)
            parts.append(np.asarray(run(np.pad(part, padding)))[: len(part)])
        return np.concatenate(parts)
