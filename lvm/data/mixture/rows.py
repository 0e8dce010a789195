"""Rows: training examples of C inputs and C targets, cut or packed from tokenized sentences.

`concat`: all sentences of a mixture, each BOS + codes + EOS, form one stream of tokens. Row r holds tokens
r·C … r·C+C; consecutive rows share one token, so that every token but the first is a target once.

`whole`: a row holds whole sentences and PAD; sentences don't attend to each other.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int32, Integer

from lvm.common.errors import UserError
from lvm.common.logging import log_warning
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.packing import BestFitPacker, ConcatPacker, Spans
from lvm.data.store.format import DamagedError
from lvm.data.store.grid_reads import read_all
from lvm.model.vocabulary import Vocabulary

SKIPPED = "skipped"  # of a counted batch


def to_tokens(codes: Integer[np.ndarray, "*batch grids N"], vocabulary: Vocabulary) -> Int32[np.ndarray, "*batch T"]:
    """Flattens the codes of sentences, and adds the BOS and EOS that the vocabulary has."""
    bos, eos = ([] if x is None else [x] for x in (vocabulary.bos, vocabulary.eos))
    num_codes = codes.shape[-2] * codes.shape[-1]
    tokens = np.empty((*codes.shape[:-2], len(bos) + num_codes + len(eos)), np.int32)
    tokens[..., : len(bos)] = bos
    tokens[..., len(bos) : len(bos) + num_codes].reshape(codes.shape)[...] = codes  # a view: only one axis is split
    tokens[..., len(bos) + num_codes :] = eos
    return tokens


def batch_spec(batch_size: int, context: int, whole: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch: rows of `context` inputs, with segment ids if packed `whole`."""
    B, C = batch_size, context
    spec = {
        "tokens": jax.ShapeDtypeStruct((B, C + 1), np.int32),
        "loss_mask": jax.ShapeDtypeStruct((B, C), np.bool_),
        "positions": jax.ShapeDtypeStruct((B, C), np.int32),
        "component_ids": jax.ShapeDtypeStruct((B, C), np.int16),
    }
    return spec | ({"segment_ids": jax.ShapeDtypeStruct((B, C), np.int32)} if whole else {})


class Rows:
    """Batches of rows, each a pure function of its step.

    Args:
      mixture: the sentences.
      vocabulary: the special tokens around them.
      context: C, inputs in a row.
      batch_size: rows in a global batch.

    Attributes:
      mixture, vocabulary, context: the arguments.
      sentence_lengths: int64 [components], tokens in a sentence.
      packer: of sentences into rows.
      skipped: damaged grid, as named by its error → (component, index) of the sentences skipped for it.

    Raises:
      UserError: `whole` with sentences longer than a row or a vocabulary without PAD; a loss on answers for a
        component that has none.
    """

    def __init__(self, mixture: Mixture, vocabulary: Vocabulary, context: int, batch_size: int):
        if batch_size < 1:
            raise UserError(f"config.batch_size={batch_size} must be positive")
        self.mixture, self.vocabulary, self.context = mixture, vocabulary, context
        self._batch_size = batch_size
        self.skipped: dict[str, set[tuple[int, int]]] = {}
        self._whole = mixture.config.packing == "whole"
        specials = (vocabulary.bos is not None) + (vocabulary.eos is not None)
        N = mixture.stores[0].codes_per_image
        grids = [component.recipe.num_grids for component in mixture.components]
        self._full_lengths = np.array(grids, np.int64) * N + specials
        self.sentence_lengths = self._full_lengths
        _check_answers(mixture)
        if self._whole:
            self._check_fit()
            self.sentence_lengths = np.minimum(self._full_lengths, context + 1)
        packer = BestFitPacker if self._whole else ConcatPacker
        self.packer: ConcatPacker | BestFitPacker = packer(mixture, self.sentence_lengths, context)

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return batch_spec(self._batch_size, self.context, self._whole)

    def batch(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The global batch at `step`, rows step·B … step·B + B − 1, by `batch_spec`.

        `component_ids` has each target's component, −1 for PAD.

        Args:
          step: from 0 on.
          rows: int [n], the rows of the batch to read and return, in this order; None for all B.
        """
        counted = self.counted_batch(step, rows)
        return {name: x for name, x in counted.items() if name != SKIPPED}

    def counted_batch(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`batch`, and int32 [1] `SKIPPED`: the number of sentences in it that damage left out."""
        rows = np.arange(self._batch_size) if rows is None else np.asarray(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._batch_size:
            raise ValueError(f"rows {rows.min()}…{rows.max()} are not in a batch of {self._batch_size}")
        ranges = [r for r in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(r)]
        if not ranges:
            empty = {name: np.zeros((0, *x.shape[1:]), x.dtype) for name, x in self.batch_spec.items()}
            return {**empty, SKIPPED: np.zeros(0, np.int32)}
        spans = [self.packer.spans(step * self._batch_size + int(r[0]), len(r)) for r in ranges]
        ends = np.cumsum([part.lengths.sum() for part in spans])[:-1]
        tokens, loss_mask, num_skipped = self._read_spans(Spans.concatenate(spans))
        columns = spans, map(len, ranges), np.split(tokens, ends), np.split(loss_mask, ends)
        parts = [self._cut(*part) for part in zip(*columns, strict=True)]
        if len(parts) > 1:
            parts[0] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**parts[0], SKIPPED: np.array([num_skipped], np.int32)}

    def sentences_read(self, steps: int) -> list[int]:
        """Sentences of each component in the first `steps` batches, rounded up to whole blocks."""
        last = max(0, steps * self._batch_size - 1)
        return self.mixture.sentences_before(self.packer.block_of_row(last) + 1)

    def check_repetitions(self, steps: int) -> None:
        """Raises UserError if the first `steps` batches exceed a component's `max_repetitions`."""
        for component, count in zip(self.mixture.components, self.sentences_read(steps), strict=True):
            component.check_repetitions(count)

    def summary(self) -> list[str]:
        """One line for each component: an epoch in rows, and what is lost."""
        lines = []
        lengths = zip(self.sentence_lengths.tolist(), self._full_lengths.tolist(), strict=True)
        for component, (length, full) in zip(self.mixture.components, lengths, strict=True):
            sentences = component.sentences_per_epoch
            if self._whole:
                per_row = (self.context + 1) // length
                rows, rest = divmod(sentences, per_row)
                size = f"{rows} rows of {per_row} and {rest} sentences"
            else:
                rows, rest = divmod(sentences * length - 1, self.context)
                size = f"{rows} rows and {rest} tokens"
            line = f"{component.name}: {sentences} sentences an epoch, by themselves {size}"
            if length < full:
                line += f"; all {sentences} lose their EOS: they have {full} tokens, a row {self.context + 1}"
            if excluded := component.num_excluded:
                line += f"; {excluded} scenes excluded: too short, a stream missing, or class too small"
            lines.append(line)
        return lines

    def _cut(self, spans: Spans, count: int, tokens: np.ndarray, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        """`count` neighboring rows, by `batch_spec`, from their spans and what was read of them."""
        C = self.context
        ends = np.cumsum(spans.lengths)
        slices = list(map(slice, (ends - spans.lengths).tolist(), ends.tolist()))

        def cut(flat: np.ndarray) -> np.ndarray:  # → [count, C + 1]
            if self._whole:
                return flat.reshape(count, C + 1)
            return np.lib.stride_tricks.sliding_window_view(flat, C + 1)[:: self.packer.stride]

        def expand(values: np.ndarray) -> np.ndarray:
            flat = np.empty(len(tokens), values.dtype)
            for part, value in zip(slices, values.tolist(), strict=True):  # faster than `np.repeat`
                flat[part] = value
            return cut(flat)

        batch = {
            "tokens": np.require(cut(tokens), requirements=["C", "W"]),
            "loss_mask": cut(loss_mask)[:, 1:].copy(),
            "component_ids": expand(spans.component_ids)[:, 1:].copy(),
        }
        position = np.arange(C + 1, dtype=np.int32)
        if not self._whole:
            return batch | {"positions": np.broadcast_to(position[:C], (count, C))}
        positions = np.zeros(len(tokens), np.int32)
        for i in np.flatnonzero(spans.segment_ids).tolist():
            positions[slices[i]] = position[: slices[i].stop - slices[i].start]
        return batch | {
            "segment_ids": expand(spans.segment_ids)[:, :C].copy(),
            "positions": cut(positions)[:, :C].copy(),
        }

    def _read_spans(self, spans: Spans) -> tuple[np.ndarray, np.ndarray, int]:
        """The tokens of spans, int32 [n], their loss mask, bool [n], and the number of damaged sentences."""
        ends = np.cumsum(spans.lengths)
        tokens = np.full(ends[-1], self.vocabulary.pad or 0, np.int32)
        loss_mask, num_skipped = np.zeros(len(tokens), bool), 0
        components = np.unique(spans.component_ids[spans.component_ids >= 0]).tolist()
        selected = [np.flatnonzero(spans.component_ids == component) for component in components]
        indices, inverses = [], []
        for rows in selected:
            unique, inverse = np.unique(spans.sentence_ids[rows], return_inverse=True)
            indices.append(unique)
            inverses.append(inverse)
        read = self._read_sentences(components, indices)
        for component, rows, inverse, (sentences, damaged) in zip(components, selected, inverses, read, strict=True):
            num_skipped += int(damaged.sum())
            template = self._loss_template(component)
            columns = ends[rows], spans.lengths[rows], spans.offsets[rows]
            for i, end, length, offset in zip(inverse, *(x.tolist() for x in columns), strict=True):
                if not damaged[i]:
                    tokens[end - length : end] = sentences[i, offset : offset + length]
                    loss_mask[end - length : end] = template[offset : offset + length]
        return tokens, loss_mask, num_skipped

    def _read_sentences(
        self, components: Sequence[int], indices: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sentences of several components, read at once.

        Returns:
          For each component the tokens, int32 [n, length], and bool [n], which are damaged and to be skipped.

        Raises:
          DamagedError: a grid is damaged, and `skip_damaged` isn't set.
        """
        plans = []
        for component, ids in zip(components, indices, strict=True):
            sentences = self.mixture.components[component]
            sentences.check_repetitions(int(ids.max()) + 1)
            plans.append(sentences.reads(ids))
        results = []
        for component, ids, (codes, damages) in zip(components, indices, read_all(plans), strict=True):
            if damages and not self.mixture.config.skip_damaged:
                raise DamagedError(next(iter(damages)))
            num_grids = self.mixture.components[component].recipe.num_grids
            damaged = np.zeros(len(ids), bool)
            for message, grids in damages.items():
                rows = np.unique(grids // num_grids)
                damaged[rows] = True
                for index in ids[rows].tolist():
                    self._record_skip(message, (component, index))
            tokens = to_tokens(codes.reshape(len(ids), num_grids, -1), self.vocabulary)
            results.append((tokens, damaged))
        return results

    def _record_skip(self, reason: str, sentence: tuple[int, int]) -> None:
        is_new = reason not in self.skipped
        self.skipped.setdefault(reason, set()).add(sentence)
        if is_new:
            count = len(set().union(*self.skipped.values()))
            log_warning(f"skipped: {reason} ({len(self.skipped)} damaged grids, {count} sentences so far)")

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (lives as long as its process)
    def _loss_template(self, component: int) -> np.ndarray:
        """bool [length]: the loss mask of a component's sentences."""
        recipe, N = self.mixture.components[component].recipe, self.mixture.stores[0].codes_per_image
        mask = np.ones(self.sentence_lengths[component], bool)
        if self.mixture.config.loss == "answers":
            has_bos = self.vocabulary.bos is not None
            mask = np.pad(np.repeat(recipe.answer_mask, N), (has_bos, 1))[: len(mask)]
        if self._whole:
            mask[0] = False  # the first token of a segment has no context
        return mask

    def _check_fit(self) -> None:
        """Raises UserError unless whole sentences fit into rows; one token too many only costs the EOS."""
        if self.vocabulary.pad is None:
            raise UserError("config.data.packing='whole' needs a vocabulary with PAD; use 'concat'")
        room = self.context + 1 + (self.vocabulary.eos is not None)
        for component, length in zip(self.mixture.components, self._full_lengths.tolist(), strict=True):
            if length > room:
                raise UserError(
                    f"config.data.components.{component.name}: a sentence of its recipe ({component.recipe.kind}, "
                    f"{component.recipe.num_grids} grids) has {length} tokens, a row of config.model.context="
                    f"{self.context} has room for {room}; shorten the recipe or use config.data.packing='concat'"
                )


def _check_answers(mixture: Mixture) -> None:
    names = [component.name for component in mixture.components if not component.recipe.answer_mask.any()]
    if mixture.config.loss == "answers" and names:
        raise UserError(
            f"config.data.loss='answers' needs recipes with answers; {', '.join(names)} have one image a sentence: "
            "give them weight 0 or use 'all'"
        )
