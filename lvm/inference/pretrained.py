"""A trained transformer, loaded: logits and answers in two lines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lvm.common.errors import UserError
from lvm.inference.generator import Generator, SamplingParams, SlidingWindow
from lvm.interop import models
from lvm.model.attention import choose_kernel
from lvm.model.nnx_utils import Params, abstract_module, merge
from lvm.model.transformer import ModelConfig, Transformer
from lvm.model.vocabulary import Vocabulary

_AS_IT_IS = SamplingParams()


class LVM:
    """A transformer over codes, ready to be asked.

    Attributes:
      config: its `ModelConfig`.
      vocabulary: its `Vocabulary`.
      record: what its workdir says of its training, the tokenizer's identity among it.
      step: the training step of the weights.
    """

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
        self._params, self._mesh = params, mesh
        self._graphdef, _ = abstract_module(lambda rngs: Transformer(config, rngs))
        kernel = choose_kernel(config.attention, jax.default_backend(), config.dtype)

        @jax.jit
        def logits(params: Params, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return merge(self._graphdef, params)(tokens, positions, kernel)

        self._logits = logits

    @classmethod
    def load(
        cls,
        folder: epath.PathLike,
        dtype: str | None = None,
        step: int | None = None,
        mesh: Mesh | None = None,
    ) -> LVM:
        """Loads a model folder.

        Args:
          folder: the workdir of a run, of which the newest checkpoint is taken, or any folder that
            `lvm.interop.models` reads: transformers' Llama, or EasyLM's stream with its config.json.
          dtype: compute type, "float32" or "bfloat16"; the training's by default, or that of the weights. Weights
            stay in memory as they are stored.
          step: another of a workdir's checkpoints.
          mesh: devices over which answers are written; one by default.

        Raises:
          UserError: not a model folder, no checkpoint in it, weights of another network, a vocabulary that nothing
            declares, or an unknown dtype.
        """
        found = models.read(folder, step)
        # The kernel that training ran by need not run here.
        config = dataclasses.replace(found.config, dtype=dtype or found.config.dtype, attention="auto")
        return cls(config, found.vocabulary, found.load_params(), dict(found.record), found.step, mesh)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.config, self._params, self._mesh)

    def logits(self, tokens: Any) -> np.ndarray:
        """tokens int [B, S] → float32 [B, S, V], the logits of what follows each token.

        Raises:
          UserError: the wrong number of dimensions, an id outside the vocabulary, or more tokens than the
            context.
        """
        tokens = self._checked(tokens)
        if tokens.shape[1] > self.config.context:
            raise UserError(f"tokens: {tokens.shape[1]} a row, the model's context is {self.config.context}")
        return np.asarray(self._logits(self._params, tokens))

    def generate(
        self,
        grids: Any,
        num_images: int,
        candidates: int = 1,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        drop: int = 0,
    ) -> np.ndarray:
        """Continues prompts of images by images. BOS is put first where the vocabulary has one.

        Where prompt and answer together are longer than the context, the oldest images are dropped when it is
        full, and writing goes on after the rest.

        Args:
          grids: codes int [B, K, N], or B arrays [K_i, N] of unequal length.
          num_images: how many images to answer with.
          candidates: answers a prompt.
          temperature, top_k, top_p: see `SamplingParams`, one for all prompts or one each; codes alone
            are drawn.
          seed: one for all prompts, or one each.
          drop: how many images are dropped at once; 0 is half of those that fit.

        Returns:
          int32 [B, num_images, N], or [B, candidates, num_images, N] if candidates > 1.

        Raises:
          UserError: grids of the wrong shape, a code outside the codebook, or a prompt that leaves no room for an
            image; says how many fit.
        """
        sampling = self._samplings(temperature, top_k, top_p, len(grids))
        *_, codes = self.stream(grids, num_images, candidates, sampling, seed, drop)
        answers = codes.reshape(*codes.shape[:2], num_images, -1)
        return answers[:, 0] if candidates == 1 else answers

    def stream(
        self,
        grids: Any,
        num_images: int,
        candidates: int = 1,
        sampling: SamplingParams | Sequence[SamplingParams] = _AS_IT_IS,
        seed: int | Sequence[int] = 0,
        drop: int = 0,
        every: int = 0,
    ) -> Iterator[np.ndarray]:
        """The same, seen while it is written: after `every` codes (0: at the end), int32 [B, candidates, so far]."""
        prompts = [self._checked_grids(prompt) for prompt in grids]
        if not prompts or num_images < 1 or candidates < 1:
            raise UserError(
                f"generate: {len(prompts)} prompts, {num_images} images, {candidates} candidates; "
                "each must be at least 1"
            )
        N = prompts[0].shape[1]
        if any(prompt.shape[1] != N for prompt in prompts):
            raise UserError(f"grids: {sorted({p.shape[1] for p in prompts})} codes an image; all must agree")
        self.check_fits(max(len(prompt) for prompt in prompts), N)
        window = SlidingWindow(N, self.vocabulary.bos, drop)
        rows = [np.concatenate([window.front, prompt.ravel()]).astype(np.int32) for prompt in prompts]
        return self._generator.stream(
            rows,
            num_images * N,
            sampling,
            self._each("seed", seed, len(rows)),
            candidates,
            num_allowed=self.vocabulary.num_codes,
            window=window,
            every=every,
        )

    def generate_tokens(
        self,
        tokens: Any,
        length: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        codes_only: bool = False,
    ) -> np.ndarray:
        """Continues raw tokens int [B, S] as they are: the new ones, int32 [B, length].

        Nothing is masked unless `codes_only`. Other arguments and errors as in `generate`.
        """
        tokens = self._checked(tokens)
        new = self._generator(
            list(tokens),
            length,
            self._samplings(temperature, top_k, top_p, len(tokens)),
            self._each("seed", seed, len(tokens)),
            num_allowed=self.vocabulary.num_codes if codes_only else None,
        )
        return new[:, 0]

    def max_images(self, codes_per_image: int) -> int:
        """How many images, prompt and answer together, the context holds."""
        return SlidingWindow(codes_per_image, self.vocabulary.bos).max_grids(self.config.context)

    def check_fits(self, prompt: int, codes_per_image: int) -> None:
        """That a prompt of so many images leaves room for an answer.

        Raises:
          UserError: it doesn't; says how many fit.
        """
        fit = self.max_images(codes_per_image)
        if prompt + 1 > fit:
            raise UserError(
                f"a prompt of {prompt} images and an answer don't fit: "
                f"the model's context of {self.config.context} holds {fit} images of {codes_per_image} codes"
            )

    def _checked(self, tokens: Any) -> np.ndarray:
        try:
            array = np.asarray(tokens)
        except ValueError as error:
            raise UserError("tokens: rows of unequal length, wanted integers [B, S]") from error
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
            raise UserError(f"tokens: {array.dtype} {list(array.shape)}, wanted integers [B, S], none empty")
        if array.min() < 0 or array.max() >= self.vocabulary.size:
            raise UserError(
                f"tokens: ids from {array.min()} to {array.max()}, the vocabulary has 0..{self.vocabulary.size - 1}"
            )
        return array.astype(np.int32)

    def _checked_grids(self, grids: Any) -> np.ndarray:
        array = np.asarray(grids)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
            raise UserError(f"grids: {array.dtype} {list(array.shape)} for a prompt, wanted integers [K, N]")
        if array.min() < 0 or array.max() >= self.vocabulary.num_codes:
            raise UserError(
                f"grids: codes from {array.min()} to {array.max()}, "
                f"the codebook has 0..{self.vocabulary.num_codes - 1}"
            )
        return array

    def _samplings(self, temperature: Any, top_k: Any, top_p: Any, rows: int) -> list[SamplingParams]:
        named = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        columns = [self._each(name, value, rows) for name, value in named.items()]
        return [SamplingParams(*fields) for fields in zip(*columns, strict=True)]

    @staticmethod
    def _each(name: str, value: Any, rows: int) -> list[Any]:
        values = np.ravel(value).tolist() * (rows if np.ndim(value) == 0 else 1)
        if len(values) != rows:
            raise UserError(f"{name}: {len(values)} for {rows} prompts; give one, or one each")
        return values
