"""Rows: sentences as tokens, cut into training examples.

The sentences of a mixture, each BOS + codes + EOS, make one stream of tokens. Row r holds tokens r·C … r·C+C:
C inputs and C targets, and neighbours share one token, so that every token but the first is a target once.
"""

from __future__ import annotations

import jax
import numpy as np

from lvm.data.mixture import BLOCK, Mixture
from lvm.errors import UserError
from lvm.vocabulary import Vocabulary


def to_tokens(codes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """A sentence's codes int [grids, N] → tokens int32 [grids·N (+2)], wrapped in BOS and EOS if there are."""
    bos = [vocabulary.bos] if vocabulary.bos is not None else []
    eos = [vocabulary.eos] if vocabulary.eos is not None else []
    return np.concatenate([bos, codes.ravel(), eos]).astype(np.int32)


class Rows:
    """Batches of rows, each a pure function of its step.

    Args:
      mixture: the sentences.
      vocabulary: the specials around them.
      context: C, inputs a row.
      batch_size: rows a global batch.
    """

    def __init__(self, mixture: Mixture, vocabulary: Vocabulary, context: int, batch_size: int):
        if batch_size < 1:
            raise UserError(f"config.batch_size: {batch_size} is not positive")
        self._mixture, self._vocabulary, self._context = mixture, vocabulary, context
        self._batch_size = batch_size
        specials = (vocabulary.bos is not None) + (vocabulary.eos is not None)
        N = mixture.stores[0].codes_per_image
        self._lengths = np.array([s.recipe.num_grids * N + specials for s in mixture.sources])  # [sources]

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        B, C = self._batch_size, self._context
        return {
            "tokens": jax.ShapeDtypeStruct((B, C + 1), np.int32),
            "loss_mask": jax.ShapeDtypeStruct((B, C), np.bool_),
            "positions": jax.ShapeDtypeStruct((B, C), np.int32),
            "source_ids": jax.ShapeDtypeStruct((B, C), np.int16),
        }

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The global batch at `step`: rows step·B … step·B + B − 1, by `batch_spec`.

        `source_ids` tells each target's source.
        """
        rows = [self.row(step * self._batch_size + i) for i in range(self._batch_size)]
        shape = (self._batch_size, self._context)
        return {
            "tokens": np.stack([tokens for tokens, _ in rows]),
            "loss_mask": np.ones(shape, bool),
            "positions": np.broadcast_to(np.arange(self._context, dtype=np.int32), shape).copy(),
            "source_ids": np.stack([sources[1:] for _, sources in rows]),
        }

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [C+1] of row `number`, and the source of each, int16 [C+1]."""
        start, length = number * self._context, self._context + 1
        block = self._find_block(start)
        offset = start - self._tokens_before(block)
        tokens: list[np.ndarray] = []
        sources: list[np.ndarray] = []
        while length > 0:
            ids, numbers = self._mixture.block(block)
            ends = np.cumsum(self._lengths[ids])  # [BLOCK]
            for i in range(int(np.searchsorted(ends, offset, side="right")), BLOCK):
                if length <= 0:
                    break
                sentence = to_tokens(
                    self._mixture.sources[ids[i]].sentence(int(numbers[i])), self._vocabulary
                )
                piece = sentence[offset - (ends[i] - len(sentence)) :][:length]
                tokens.append(piece)
                sources.append(np.full(len(piece), ids[i], np.int16))
                offset += len(piece)
                length -= len(piece)
            block, offset = block + 1, 0
        return np.concatenate(tokens), np.concatenate(sources)

    def _tokens_before(self, block: int) -> int:
        return sum(
            count * int(length)
            for count, length in zip(self._mixture.before(block), self._lengths, strict=True)
        )

    def _find_block(self, token: int) -> int:
        low, high = 0, 1
        while self._tokens_before(high) <= token:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._tokens_before(middle) <= token else (low, middle)
        return low
