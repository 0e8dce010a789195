"""A trained transformer, loaded: logits and answers in two lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lvm.attention import choose_kernel
from lvm.config import from_config_dict
from lvm.errors import UserError
from lvm.generate import Sampling, generate_tokens
from lvm.model import ModelConfig, Transformer
from lvm.module import Params, abstract, merge
from lvm.training.checkpoint import load_params
from lvm.training.workdir import read_record
from lvm.vocabulary import Vocabulary


class LVM:
    """A transformer over codes, ready to be asked.

    Attributes:
      config: its `ModelConfig`.
      vocabulary: its `Vocabulary`.
      record: what its workdir says of its training, the tokenizer's identity among it.
      step: the training step of the weights.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, params: Params, record: dict[str, Any], step: int
    ):
        self.config, self.vocabulary, self.record, self.step = config, vocabulary, record, step
        self._params = params
        self._graphdef, _ = abstract(lambda rngs: Transformer(config, rngs))
        kernel = choose_kernel(config.attention, jax.default_backend(), config.dtype)

        @jax.jit
        def logits(params: Params, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return merge(self._graphdef, params)(tokens, positions, kernel)

        self._logits = logits

    @classmethod
    def load(cls, folder: epath.PathLike, dtype: str | None = None) -> LVM:
        """Loads a model folder.

        Args:
          folder: the workdir of a run, of which the newest checkpoint is taken.
          dtype: compute type, "float32" or "bfloat16"; the training's by default.

        Raises:
          UserError: not a model folder, no checkpoint in it, or an unknown dtype.
        """
        record = read_record(folder, "lvm", ("config", "tokenizer", "stores", "sources"))
        vocabulary = Vocabulary.load(folder)
        config = from_config_dict(
            ModelConfig, record["config"]["model"], f"{folder}/config.json: config.model"
        )
        config = dataclasses.replace(config, vocabulary_size=vocabulary.size, dtype=dtype or config.dtype)
        _, shapes = abstract(lambda rngs: Transformer(config, rngs))
        params, step = load_params(folder, shapes)
        return cls(config, vocabulary, params, record, step)

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
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> np.ndarray:
        """Continues prompts of images by images. BOS is put first where the vocabulary has one.

        Args:
          grids: codes int [B, K, N], or B arrays [K_i, N] of unequal length.
          num_images: how many images to answer with.
          candidates: answers a prompt.
          temperature, top_k, top_p: see `lvm.generate.Sampling`; codes alone are drawn.
          seed: one for all prompts, or one each.

        Returns:
          int32 [B, num_images, N], or [B, candidates, num_images, N] if candidates > 1.

        Raises:
          UserError: grids of the wrong shape, a code outside the codebook, or a prompt that with the answer
            is longer than the context; says how many images fit.
        """
        prompts = [self._checked_grids(prompt) for prompt in grids]
        if not prompts or num_images < 1 or candidates < 1:
            raise UserError(
                f"generate: {len(prompts)} prompts, {num_images} images, {candidates} candidates; "
                "each must be at least 1"
            )
        N = prompts[0].shape[1]
        if any(prompt.shape[1] != N for prompt in prompts):
            raise UserError(f"grids: {sorted({p.shape[1] for p in prompts})} codes an image; all must agree")
        self._check_fits(max(len(prompt) for prompt in prompts), num_images, N)
        bos = [self.vocabulary.bos] if self.vocabulary.bos is not None else []
        rows = [np.concatenate([bos, prompt.ravel()]).astype(np.int32) for prompt in prompts]
        tokens = generate_tokens(
            self._graphdef,
            self._params,
            rows,
            num_images * N,
            Sampling(temperature, top_k, top_p),
            self._seeds(seed, len(rows)),
            candidates,
            num_allowed=self.vocabulary.num_codes,
        )
        answers = tokens.reshape(len(rows), candidates, num_images, N)
        return answers[:, 0] if candidates == 1 else answers

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
        new = generate_tokens(
            self._graphdef,
            self._params,
            list(tokens),
            length,
            Sampling(temperature, top_k, top_p),
            self._seeds(seed, len(tokens)),
            num_allowed=self.vocabulary.num_codes if codes_only else None,
        )
        return new[:, 0]

    def images_that_fit(self, codes_per_image: int) -> int:
        """How many images, prompt and answer together, the context holds."""
        return (self.config.context + 1 - (self.vocabulary.bos is not None)) // codes_per_image

    def _check_fits(self, prompt: int, answer: int, codes_per_image: int) -> None:
        fit = self.images_that_fit(codes_per_image)
        if prompt + answer > fit:
            raise UserError(
                f"a prompt of {prompt} images and an answer of {answer} don't fit: "
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

    @staticmethod
    def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
        seeds = [int(s) for s in np.ravel(seed)] * (rows if np.ndim(seed) == 0 else 1)
        if len(seeds) != rows:
            raise UserError(f"seed: {len(seeds)} seeds for {rows} prompts; give one, or one each")
        return seeds
