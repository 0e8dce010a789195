"""`LVM`: a trained transformer, loaded for logits, losses and generation."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from lvm.common import distributed
from lvm.common.config import expand_home
from lvm.common.errors import UserError
from lvm.hardware import sharding
from lvm.inference.decode_params import place_params
from lvm.inference.features import Readout, check_layers, check_pools, feature_tokens
from lvm.inference.generator import Generator, SamplingParams, SlidingWindow
from lvm.interop import models
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import Params, abstract_module, count_params, init_params, merge
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import Vocabulary
from lvm.training import losses

_DEFAULT_SAMPLING = SamplingParams()
_LOGITS_CHUNK = 256  # tokens of a row whose logits are in memory at once
_HASHED_AT_ONCE = 2**28  # bytes
_Number = int | float


class LVM:
    """A trained transformer over codes; `record` is metadata of its training, such as the tokenizer's identity."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        params: Params,
        record: dict[str, Any],
        step: int,
        mesh: Mesh | None = None,
    ):
        self.config, self.vocabulary, self.record, self.step = config, vocabulary, record, step
        self._mesh = mesh
        self._params = params if mesh is None else place_params(params, config, mesh)
        graphdef, _ = abstract_module(lambda rngs: Transformer(config, rngs))
        kernel = choose_kernel(config.attention, jax.default_backend(), config.dtype, config.head_dim)

        # On several devices rows are sharded as in training, and results are gathered on all of them.
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        jit = functools.partial(jax.jit, out_shardings=replicated)

        def positions(tokens: jax.Array) -> jax.Array:
            return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def run(params: Params, tokens: jax.Array) -> tuple[Transformer, jax.Array]:
            model: Transformer = merge(graphdef, params)
            return model, model.hidden(tokens, positions(tokens), kernel)

        @jit
        def logits(params: Params, tokens: jax.Array) -> jax.Array:
            with sharding.use_mesh(mesh):
                model, hidden = run(params, sharding.constrain(tokens, "batch", None))
                return model.logits(hidden)

        @jit
        def token_losses(params: Params, tokens: jax.Array) -> jax.Array:
            with sharding.use_mesh(mesh):
                inputs, targets = (sharding.constrain(x, "batch", None) for x in (tokens[:, :-1], tokens[:, 1:]))
                model, hidden = run(params, inputs)
                return losses.token_losses(model.norm(hidden), model.output_projection(), targets, _LOGITS_CHUNK)[0]

        @functools.partial(jit, static_argnums=(2, 3))
        def features(
            params: Params, tokens: jax.Array, readout: Readout, layers: tuple[int, ...]
        ) -> dict[str, jax.Array]:
            with sharding.use_mesh(mesh):
                tokens = sharding.constrain(tokens, "batch", None)
                model: Transformer = merge(graphdef, params)
                states = model.hidden_by_layer(tokens, positions(tokens), kernel, readout)
                return {pool: jnp.swapaxes(x[jnp.array(layers)], 0, 1) for pool, x in states.items()}

        self._logits, self._token_losses, self._features = logits, token_losses, features

    @classmethod
    def load(
        cls, folder: epath.PathLike, dtype: str | None = None, step: int | None = None, mesh: Mesh | None = None
    ) -> LVM:
        """Loads a model folder.

        Args:
          folder: a workdir (its newest checkpoint), or any folder that `lvm.interop.models` reads: Hugging Face Llama,
            or an EasyLM stream with its config.json.
          dtype: compute dtype, "float32" or "bfloat16"; by default that of training, or of the weights. Weights keep
            the dtype they are stored in.
          step: another checkpoint of a workdir.
          mesh: devices that rows, heads and weights are sharded over; one by default.

        Raises:
          UserError: not a model folder, no checkpoint, weights of another architecture, no declared vocabulary, or an
            unknown dtype.
        """
        checkpoint = models.read(expand_home(os.fspath(folder)), step)
        # The attention kernel of the training hardware may not run here.
        dtype = dtype or checkpoint.config.dtype
        config = dataclasses.replace(checkpoint.config, dtype=dtype, attention="auto")
        params, record = checkpoint.load_params(), dict(checkpoint.record)
        return cls(config, checkpoint.vocabulary, params, record, checkpoint.step, mesh)

    def with_params(self, params: Params, step: int) -> LVM:
        """The model with other weights of the same shapes, as training goes on; its programs are compiled already."""
        model = copy.copy(self)
        model.__dict__.pop("_generator", None)
        model._params, model.step = params, step
        return model

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return count_params(self._params)

    def weights_hash(self) -> str:
        """SHA-256 of the weights, whichever devices have them; a collective of processes that share them."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self._params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
            rows = max(1, _HASHED_AT_ONCE * len(leaf) // leaf.nbytes)
            # Parts: JAX keeps the host's copy of an array as long as the array.
            for start in range(0, len(leaf), rows):
                digest.update(distributed.fetch(leaf[start : start + rows]).tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        config, vocabulary = self.config, self.vocabulary
        return (
            f"<LVM: {self.num_params:,} parameters, {config.num_layers} layers of {config.hidden_size}, "
            f"context {config.context}, {vocabulary.num_codes} codes of {vocabulary.size} ids, {config.dtype}, "
            f"step {self.step}>"
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.config, self._params, self._mesh)

    def logits(self, tokens: ArrayLike) -> Float[np.ndarray, "B S V"]:
        """Logits of the token after each of `tokens` int [B, S].

        Raises UserError for a wrong dtype or shape, an id outside the vocabulary, or rows longer than the context.
        """
        return self._map_rows(self._logits, self._check_tokens(tokens, self.config.context))

    def token_losses(self, tokens: ArrayLike) -> Float[np.ndarray, "B _"]:
        """Negative log-likelihood in nats of `tokens[:, 1:]`, each given the tokens before it.

        Computed on device and in chunks, as in training. Errors as in `logits`.
        """
        return self._map_rows(self._token_losses, self._check_tokens(tokens, self.config.context + 1))

    def features(
        self, codes: ArrayLike, pools: Sequence[str] = ("mean",), layers: Sequence[int] | None = None, copies: int = 1
    ) -> dict[str, Float[np.ndarray, "B layers *_"]]:
        """Hidden states at the codes of images int [B, N], one image a row after BOS if the vocabulary has one.

        Args:
          pools: "mean" over the codes of the image, "last" at the last one, "codes" at each.
          layers: 0 is the embedding, i the hidden states after layer i; all by default.
          copies: times that the image is in its row; features are those of the last copy, all of whose codes have seen
            the whole image if there are several.

        Returns:
          By pool float32 [B, layers, D], or [B, layers, N, D] of "codes".

        Raises:
          UserError: an unknown pool or layer, codes outside the codebook, or copies that exceed the context.
        """
        pools, layers = check_pools(pools), check_layers(layers, self.config.num_layers)
        images = _check_ids("codes", codes, self.vocabulary.num_codes)
        tokens = feature_tokens(images, self.vocabulary.bos, copies)
        if copies < 1 or tokens.shape[1] > self.config.context:
            raise UserError(
                f"copies={copies} of {images.shape[1]} codes don't fit the context of {self.config.context}; "
                f"at least 1, at most {(self.config.context - (self.vocabulary.bos is not None)) // images.shape[1]}"
            )
        readout = Readout(pools, tokens.shape[1] - images.shape[1], images.shape[1])
        states = self._features(self._params, self._pad(tokens, tokens.shape[1]), readout, layers)
        return {pool: np.asarray(x)[: len(images)].astype(np.float32) for pool, x in states.items()}

    def with_random_params(self, seed: int) -> LVM:
        """The model with initial weights instead of its own, as a baseline."""

        def init(key: jax.Array) -> Params:
            params = init_params(lambda rngs: Transformer(self.config, rngs), key)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), params, self._params)

        placed = None if self._mesh is None else jax.tree.map(lambda x: x.sharding, self._params)
        return self.with_params(jax.jit(init, out_shardings=placed)(jax.random.key(seed)), 0)

    def _map_rows(self, function: Callable[[Params, np.ndarray], jax.Array], tokens: np.ndarray) -> np.ndarray:
        """Calls a function of rows, int32 [B, S]."""
        B, S = tokens.shape
        inputs = S - (function is self._token_losses)
        return np.asarray(function(self._params, self._pad(tokens, inputs)))[:B, :inputs]

    def _pad(self, tokens: np.ndarray, inputs: int) -> np.ndarray:
        """Pads rows so that the mesh divides their number and `inputs`; a mask hides later tokens from earlier ones."""
        if self._mesh is None:
            return tokens
        rows, columns = (sharding.axis_size(self._mesh, axes) for axes in (("data", "fsdp"), ("sequence",)))
        return np.pad(tokens, ((0, -len(tokens) % rows), (0, -inputs % columns)))

    def generate(
        self,
        grids: np.ndarray | Sequence[ArrayLike],
        num_images: int,
        candidates: int = 1,
        temperature: _Number | Sequence[_Number] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: _Number | Sequence[_Number] = 1.0,
        seed: int | Sequence[int] = 0,
        drop: int = 0,
    ) -> Int[np.ndarray, "B *_ N"]:
        """Continues prompts of images by images; BOS is prepended if the vocabulary has one.

        When the context is full, the oldest images are dropped and the rest is prefilled again.

        Args:
          grids: codes int [B, K, N], or B arrays [K_i, N] of unequal length.
          num_images: images to generate.
          candidates: answers per prompt.
          temperature, top_k, top_p: see `SamplingParams`; one for all prompts or one each. Only codes are sampled.
          seed: one for all prompts, or one each.
          drop: images dropped at once; 0 is half of those that fit.

        Returns:
          int32 [B, num_images, N], or [B, candidates, num_images, N] if candidates > 1.

        Raises:
          UserError: grids of the wrong shape, a code outside the codebook, or no room for an image after the prompt.
        """
        fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        columns = [_broadcast(name, value, len(grids)) for name, value in fields.items()]
        sampling = [SamplingParams(float(t), k, float(p)) for t, k, p in zip(*columns, strict=True)]
        *_, codes = self.stream(grids, num_images, candidates, sampling, seed, drop)
        answers = codes.reshape(*codes.shape[:2], num_images, -1)
        return answers[:, 0] if candidates == 1 else answers

    def stream(
        self,
        grids: np.ndarray | Sequence[ArrayLike],
        num_images: int,
        candidates: int = 1,
        sampling: SamplingParams | Sequence[SamplingParams] = _DEFAULT_SAMPLING,
        seed: int | Sequence[int] = 0,
        drop: int = 0,
        every: int = 0,
    ) -> Iterator[Int[np.ndarray, "B candidates codes"]]:
        """`generate` that yields all codes so far after every `every` new ones (0: at the end)."""
        prompts = [_check_ids("grids of a prompt", grid, self.vocabulary.num_codes) for grid in grids]
        if not prompts or num_images < 1 or candidates < 1:
            raise UserError(
                f"{len(prompts)} prompts, num_images={num_images}, candidates={candidates}; each must be at least 1"
            )
        N = prompts[0].shape[1]
        if any(prompt.shape[1] != N for prompt in prompts):
            sizes = sorted({prompt.shape[1] for prompt in prompts})
            raise UserError(f"grids have {sizes} codes per image; all prompts must have the same number")
        self.check_fits(max(len(prompt) for prompt in prompts), N)
        window = SlidingWindow(N, self.vocabulary.bos, drop)
        return self._generator.stream(
            [np.concatenate([window.prefix, prompt.ravel()]).astype(np.int32) for prompt in prompts],
            num_images * N,
            sampling,
            _broadcast("seed", seed, len(prompts)),
            candidates,
            num_allowed=self.vocabulary.num_codes,
            window=window,
            every=every,
        )

    def generate_tokens(
        self,
        tokens: ArrayLike,
        num_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams] = _DEFAULT_SAMPLING,
        seed: int | Sequence[int] = 0,
        codes_only: bool = False,
    ) -> Int[np.ndarray, "B num_tokens"]:
        """Continues raw tokens int [B, S]; returns the new ones. Every id may be sampled unless `codes_only`."""
        rows = self._check_tokens(tokens, self.config.context)
        num_allowed = self.vocabulary.num_codes if codes_only else None
        seeds = _broadcast("seed", seed, len(rows))
        return self._generator(list(rows), num_tokens, sampling, seeds, num_allowed=num_allowed)[:, 0]

    def max_images(self, codes_per_image: int) -> int:
        """Images, prompt and answer together, that fit the context."""
        return SlidingWindow(codes_per_image, self.vocabulary.bos).max_grids(self.config.context)

    def check_fits(self, num_images: int, codes_per_image: int) -> None:
        """Raises UserError if a prompt of `num_images` leaves no room for an answer in the context."""
        limit = self.max_images(codes_per_image)
        if num_images + 1 > limit:
            raise UserError(
                f"a prompt of {num_images} images and an answer don't fit the context of {self.config.context}, "
                f"which holds {limit} images of {codes_per_image} codes; use fewer images"
            )

    def _check_tokens(self, tokens: ArrayLike, max_length: int) -> np.ndarray:
        array = _check_ids("tokens", tokens, self.vocabulary.size)
        if array.shape[1] > max_length:
            raise UserError(f"tokens: rows of {array.shape[1]} exceed the context of {self.config.context}")
        return array


def _check_ids(name: str, ids: ArrayLike, limit: int) -> np.ndarray:
    """Returns `ids` as int32. Raises UserError unless they are two-dimensional integers in [0, limit)."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise UserError(f"{name}: rows of unequal length; expected integers with 2 dimensions") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
        raise UserError(f"{name}: {array.dtype} {list(array.shape)}; expected integers, 2-D and not empty")
    if array.min() < 0 or array.max() >= limit:
        raise UserError(f"{name}: ids from {array.min()} to {array.max()}; expected 0..{limit - 1}")
    return array.astype(np.int32)


def _broadcast(name: str, value: Any, num_prompts: int) -> list[Any]:
    values = np.ravel(value).tolist() * (num_prompts if np.ndim(value) == 0 else 1)
    if len(values) != num_prompts:
        raise UserError(f"{name} has {len(values)} values for {num_prompts} prompts; give one, or one each")
    return values
