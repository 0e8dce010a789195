"""A trained tokenizer: images to codes and back in two lines."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

from lvm.common.config import expand_home
from lvm.common.errors import UserError
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources.image_file import UnreadableError, read_image
from lvm.model.nnx_utils import Params, abstract_module, count_params, merge
from tokenizer import weights
from tokenizer.network import VQGAN, VQGANConfig
from tokenizer.objective import to_float, to_uint8

_BATCH = 8  # every call is padded to this many images per device, so that codes cannot depend on the batch
_ENCODING, _DECODING = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")  # subtrees of the parameters

Rows = Any  # an array [B, ...]


class Tokenizer:
    """Images ↔ codes.

    Attributes:
      preprocess: maps any image to the network's input size; part of what the codes mean.
      step: training step of the weights.
      encoder: `DataParallel` of images uint8 [B, R, R, 3] → codes uint16 [B, N].
      decoder: `DataParallel` of codes int32 [B, N] → images float32 [B, R, R, 3].
    """

    def __init__(self, config: VQGANConfig, preprocess: Preprocess, params: Params, step: int = 0):
        self.config, self.preprocess, self.params, self.step = config, preprocess, params, step
        graphdef, shapes = abstract_module(lambda rngs: VQGAN(config, rngs))

        def network(subtrees: Params) -> VQGAN:
            # Encoding does not need the decoder's weights, nor the reverse; unused zeros are compiled away.
            missing = {name: tree for name, tree in shapes.items() if name not in subtrees}
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), missing)
            return merge(graphdef, {**zeros, **subtrees})

        def data_parallel(function: Callable[[VQGAN, Rows], Rows], unused: Sequence[str]) -> DataParallel:
            subtrees = {name: tree for name, tree in params.items() if name not in unused}
            run = lambda subtrees, rows: function(network(subtrees), rows)  # noqa: E731
            return DataParallel(run, subtrees, deterministic=unused is _DECODING)

        self.encoder = data_parallel(lambda net, x: net.encode(to_float(x)).astype(jnp.uint16), _DECODING)
        self._latents = data_parallel(lambda net, x: net.encode_latents(x), _DECODING)
        self.decoder = data_parallel(lambda net, codes: net.decode_float(codes), _ENCODING)

    @classmethod
    def load(cls, folder: epath.PathLike, dtype: str | None = None) -> Tokenizer:
        """Loads a model folder.

        Args:
          folder: a workdir, of which the newest checkpoint is loaded, or any folder that `tokenizer.weights` reads:
            published weights with their config.json.
          dtype: compute type, "float32" or "bfloat16"; default: that of training.

        Raises:
          UserError: not a tokenizer's folder, weights of another network, or an unknown dtype.
        """
        stored = weights.read(expand_home(os.fspath(folder)))
        config = dataclasses.replace(stored.config, compute_dtype=dtype) if dtype else stored.config
        return cls(config, stored.preprocess, stored.params, stored.step)

    def __repr__(self) -> str:
        config, (height, width) = self.config, self.config.grid
        return (
            f"<Tokenizer: {count_params(self.params):,} parameters, images of {config.resolution}×{config.resolution}, "
            f"{height}×{width} codes of {config.codebook_size}, {config.compute_dtype}, step {self.step}>"
        )

    @property
    def codes_per_image(self) -> int:
        return self.config.codes_per_image

    @property
    def num_devices(self) -> int:
        """Devices of this process, which share the images of a call."""
        return len(jax.local_devices())

    def identity(self) -> dict[str, Any]:
        """Everything that codes depend on, as JSON.

        `weights` is a hash of the weights, `hash` one of weights, network and preprocessing. `codes` is `hash` without
        the weights of the decoder: tokenizers that share it give equal codes (`lvm.data.store.manifest.same_codes`).
        """
        form = {
            "model": self.config.describe(),
            "preprocess": self.preprocess.to_json(),
            "grid": list(self.config.grid),
            "num_codes": self.config.codebook_size,
        }
        encoding = {name: tree for name, tree in self.params.items() if name not in _DECODING}
        identity = {"weights": _hash_weights(self.params), **form}
        return identity | {"codes": _hash({"weights": _hash_weights(encoding), **form}), "hash": _hash(identity)}

    def encode(self, images: ArrayLike, batch_size: int = _BATCH) -> Int32[np.ndarray, "B N"]:
        """Codes of uint8 images [B, R, R, 3] in raster order; `batch_size` is images per device and call.

        Raises:
          UserError: another shape or dtype.
        """
        return self.encoder.in_batches(self._check_images(images, np.uint8), batch_size).astype(np.int32)

    def encode_latents(self, images: ArrayLike, batch_size: int = _BATCH) -> Float32[np.ndarray, "B N C"]:
        """Latents before quantization, of images as uint8 or as floats in [0, 1], [B, R, R, 3]."""
        if np.issubdtype(np.asarray(images).dtype, np.floating):
            images = self._check_images(images, np.floating).astype(np.float32)
        else:
            images = self._check_images(images, np.uint8).astype(np.float32) / 255
        latents = self._latents.in_batches(images, batch_size)
        return latents.reshape(len(images), self.codes_per_image, -1)

    def decode_float(self, codes: ArrayLike, batch_size: int = _BATCH) -> Float32[np.ndarray, "B R R 3"]:
        """Images of integer codes [B, N], not clipped to [0, 1].

        Raises:
          UserError: another shape or dtype, or a code outside the codebook.
        """
        codes, N, K = np.asarray(codes), self.codes_per_image, self.config.codebook_size
        if codes.ndim != 2 or codes.shape[1] != N or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"codes: {codes.dtype} {list(codes.shape)}, expected integers [B, {N}]")
        if codes.size and (codes.min() < 0 or codes.max() >= K):
            raise UserError(f"codes: from {codes.min()} to {codes.max()}, the codebook has 0..{K - 1}")
        return self.decoder.in_batches(codes.astype(np.int32), batch_size)

    def decode(self, codes: ArrayLike, batch_size: int = _BATCH) -> UInt8[np.ndarray, "B R R 3"]:
        """Images of integer codes [B, N]: round(255·clip(x, 0, 1))."""
        return np.asarray(to_uint8(jnp.asarray(self.decode_float(codes, batch_size))))

    def encode_async(self, images: UInt8[np.ndarray, "B R R 3"]) -> UInt16[Array, "B N"]:
        """Dispatches one call on all devices and returns the codes as a device array.

        B must be a multiple of `num_devices`.
        """
        return self.encoder(images, self.num_devices)

    def read_image(self, path: epath.PathLike) -> UInt8[np.ndarray, "R R 3"]:
        """Reads and preprocesses an image file.

        Raises:
          UserError: the file is missing or not an image.
        """
        try:
            return read_image(pathlib.Path(path), self.preprocess)
        except (UnreadableError, UserError) as error:
            raise UserError(f"{path}: can't be read as an image: {error}") from error

    def _check_images(self, images: ArrayLike, dtype: type[np.generic]) -> np.ndarray:
        images, side = np.asarray(images), self.config.resolution
        if not np.issubdtype(images.dtype, dtype):
            raise UserError(f"images: {images.dtype}, expected uint8 [B, {side}, {side}, 3]")
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise UserError(
                f"images: {list(images.shape)}, expected [B, {side}, {side}, 3]; `preprocess` resizes any image"
            )
        return images


class DataParallel:
    """A function of rows, compiled for one device and for all of them as the same program per device.

    Args:
      function: (params, rows [B, ...]) → rows [B, ...], each row independent of the others.
      params: its first argument, replicated.
      deterministic: uses fixed algorithms instead of autotuned ones, so that processes agree to the bit.
    """

    def __init__(self, function: Callable[[Params, Rows], Rows], params: Params, deterministic: bool = False):
        self._function, self._params, self._deterministic = function, params, deterministic

    def __call__(self, rows: Rows, num_devices: int) -> jax.Array:
        """Calls the function on rows [B, ...], B / num_devices on each device."""
        params, run = self._compiled(num_devices)
        return run(params, rows)

    def lower(self, rows: Rows, num_devices: int) -> jax.stages.Lowered:
        """Lowers the program of such a call."""
        params, run = self._compiled(num_devices)
        return run.lower(params, rows)

    def in_batches(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Calls the function on rows [n, ...] in batches of `batch_size` per device, padding the last."""
        num_devices = 1 if len(rows) <= batch_size else len(jax.local_devices())
        step, outputs = batch_size * num_devices, []
        for start in range(0, max(len(rows), 1), step):
            batch = rows[start : start + step]
            padding = [(0, step - len(batch))] + [(0, 0)] * (rows.ndim - 1)
            outputs.append(np.asarray(self(np.pad(batch, padding), num_devices))[: len(batch)])
        return np.concatenate(outputs)

    @functools.cache  # noqa: B019 (lives as long as its tokenizer)
    def _compiled(self, num_devices: int) -> tuple[Params, Any]:
        devices = jax.local_devices()[:num_devices]
        mesh = jax.make_mesh((num_devices,), ("rows",), (AxisType.Auto,), devices=devices)
        sharded = jax.shard_map(
            self._function, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"), check_vma=False
        )
        # Only GPU backends autotune between algorithms that differ in their last bits.
        fixed = self._deterministic and jax.default_backend() == "gpu"
        run = jax.jit(sharded, compiler_options={"xla_gpu_deterministic_ops": True} if fixed else None)
        return jax.device_put(self._params, NamedSharding(mesh, P())), run


def _hash_weights(params: Params) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
