"""A trained tokenizer, loaded: images to codes and back in two lines."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.image_file import UnreadableError, read_image
from lvm.model.nnx_utils import Params, abstract_module, merge
from tokenizer import weights
from tokenizer.network import VQGAN, VQGANConfig
from tokenizer.objective import to_float, to_uint8

BATCH_PER_DEVICE = (
    8  # images a device; every call has this many, padded, so codes can't depend on how many came
)

Rows = Any  # an array [B, ...]
_ENCODING, _DECODING = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")  # parts of the network


class Tokenizer:
    """Images ↔ codes.

    Attributes:
      config: its `VQGANConfig`.
      preprocess: how any picture becomes an image of its size; part of what the codes mean.
      params: the weights, a nested dict.
      step: the training step of the weights.
      encoder: `DataParallel` of images uint8 [B, R, R, 3] → codes uint16 [B, N].
      decoder: `DataParallel` of codes int32 [B, N] → images float32 [B, R, R, 3].
    """

    def __init__(self, config: VQGANConfig, preprocess: Preprocess, params: Params, step: int = 0):
        self.config, self.preprocess, self.params, self.step = config, preprocess, params, step
        graphdef, shapes = abstract_module(lambda rngs: VQGAN(config, rngs))

        def network(part: Params) -> VQGAN:
            # Whoever encodes has no use for the decoder's weights: what isn't given is never looked at.
            missing = {name: tree for name, tree in shapes.items() if name not in part}
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), missing)
            return merge(graphdef, {**zeros, **part})

        def on_devices(function: Callable[[VQGAN, Rows], Rows], unused: Sequence[str]) -> DataParallel:
            part = {name: tree for name, tree in params.items() if name not in unused}
            deterministic = unused is _DECODING
            return DataParallel(lambda part, rows: function(network(part), rows), part, deterministic)

        self.encoder = on_devices(lambda net, x: net.encode(to_float(x)).astype(jnp.uint16), _DECODING)
        self._latents = on_devices(lambda net, x: net.encode_latents(x), _DECODING)
        self.decoder = on_devices(lambda net, codes: net.decode_float(codes), _ENCODING)

    @classmethod
    def load(cls, folder: epath.PathLike, dtype: str | None = None) -> Tokenizer:
        """Loads a model folder.

        Args:
          folder: the workdir of a run, of which the newest checkpoint is taken, or any folder that
            `tokenizer.weights` reads: published weights with their config.json.
          dtype: compute type, "float32" or "bfloat16"; the training's by default.

        Raises:
          UserError: not a tokenizer's folder, no weights of that network in it, or an unknown dtype.
        """
        found = weights.read(folder)
        config = dataclasses.replace(found.config, compute_dtype=dtype) if dtype else found.config
        return cls(config, found.preprocess, found.params, found.step)

    @property
    def codes_per_image(self) -> int:
        return self.config.num_codes_per_image

    def identity(self) -> dict[str, Any]:
        """What the meaning of a code depends on, as JSON.

        `weights` is a hash of the weights alone, `hash` one of all: weights, network and preprocessing.
        """
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.params):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        identity = {
            "weights": digest.hexdigest(),
            "model": {key: value for key, value in to_json(self.config).items() if key != "compute_dtype"},
            "preprocess": self.preprocess.to_json(),
            "grid": list(self.config.grid),
            "num_codes": self.config.codebook_size,
        }
        return identity | {"hash": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}

    def encode(self, images: Any, batch_size: int = BATCH_PER_DEVICE) -> np.ndarray:
        """Images uint8 [B, R, R, 3] → codes int32 [B, N] in raster order.

        Args:
          images: of the tokenizer's size; `t.preprocess` makes them of any picture.
          batch_size: images a device; each call has as many, padded.

        Raises:
          UserError: another shape or type.
        """
        images = self._checked(images)
        return self.encoder.in_batches(images, batch_size).astype(np.int32)

    def encode_latents(self, images: Any, batch_size: int = BATCH_PER_DEVICE) -> np.ndarray:
        """Images uint8, or float in [0, 1], [B, R, R, 3] → latents float32 [B, N, C] before quantization."""
        images = np.asarray(images)
        if not np.issubdtype(images.dtype, np.floating):
            images = self._checked(images).astype(np.float32) / 255
        self._check_shape(images)
        images = images.astype(np.float32)
        latents = self._latents.in_batches(images, batch_size)
        return latents.reshape(len(images), self.codes_per_image, -1)

    def decode_float(self, codes: Any, batch_size: int = BATCH_PER_DEVICE) -> np.ndarray:
        """Codes int [B, N] → float32 [B, R, R, 3], not clipped.

        Raises:
          UserError: another shape or type, or a code outside the codebook.
        """
        codes, N, K = np.asarray(codes), self.codes_per_image, self.config.codebook_size
        if codes.ndim != 2 or codes.shape[1] != N or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"codes: {codes.dtype} {list(codes.shape)}, wanted integers [B, {N}]")
        if codes.size and (codes.min() < 0 or codes.max() >= K):
            raise UserError(f"codes: from {codes.min()} to {codes.max()}, the codebook has 0..{K - 1}")
        return self.decoder.in_batches(codes.astype(np.int32), batch_size)

    def decode(self, codes: Any, batch_size: int = BATCH_PER_DEVICE) -> np.ndarray:
        """Codes int [B, N] → images uint8 [B, R, R, 3]: round(255·clip(x, 0, 1))."""
        return np.asarray(to_uint8(jnp.asarray(self.decode_float(codes, batch_size))))

    @property
    def num_devices(self) -> int:
        """The devices of this process, which share the images of a call."""
        return len(jax.local_devices())

    def encode_async(self, images: np.ndarray) -> jax.Array:
        """One call on all devices without waiting for it: uint8 [B, R, R, 3] → codes uint16 [B, N] still there.

        B is a multiple of `num_devices`.
        """
        return self.encoder(images, self.num_devices)

    def read_image(self, path: epath.PathLike) -> np.ndarray:
        """A picture file as an image of the tokenizer's size, uint8 [R, R, 3].

        Raises:
          UserError: the file is missing or not a picture.
        """
        try:
            return read_image(pathlib.Path(path), self.preprocess)
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


class DataParallel:
    """A function of rows, compiled for one device and for all: the program that each of them runs is the same.

    Args:
      function: (params, rows [B, ...]) → rows [B, ...], each row on its own.
      params: its first argument.
      deterministic: by algorithms that are fixed, not timed and chosen anew by each process: the same bits always.
    """

    def __init__(self, function: Callable[[Params, Rows], Rows], params: Params, deterministic: bool = False):
        self._function, self._params, self._deterministic = function, params, deterministic

    def __call__(self, rows: Rows, num_devices: int) -> jax.Array:
        """Rows [B, ...] → rows, of which each device makes B / num_devices."""
        params, run = self._compiled(num_devices)
        return run(params, rows)

    def lower(self, rows: Rows, num_devices: int) -> jax.stages.Lowered:
        """The program that such a call runs, not yet compiled."""
        params, run = self._compiled(num_devices)
        return run.lower(params, rows)

    def in_batches(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Rows [n, ...] → rows, in calls of `batch_size` a device, the last one padded."""
        num_devices = 1 if len(rows) <= batch_size else len(jax.local_devices())
        at_once = batch_size * num_devices
        parts = []
        for start in range(0, max(len(rows), 1), at_once):
            part = rows[start : start + at_once]
            padding = [(0, at_once - len(part))] + [(0, 0)] * (rows.ndim - 1)
            parts.append(np.asarray(self(np.pad(part, padding), num_devices))[: len(part)])
        return np.concatenate(parts)

    @functools.cache  # noqa: B019 (lives as long as its tokenizer)
    def _compiled(self, num_devices: int) -> tuple[Params, Any]:
        mesh = jax.make_mesh(
            (num_devices,), ("rows",), (AxisType.Auto,), devices=jax.local_devices()[:num_devices]
        )
        split = jax.shard_map(
            self._function, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"), check_vma=False
        )
        # Other platforms have no such choice.
        fixed = self._deterministic and jax.default_backend() == "gpu"
        run = jax.jit(split, compiler_options={"xla_gpu_deterministic_ops": True} if fixed else None)
        return jax.device_put(self._params, NamedSharding(mesh, P())), run
