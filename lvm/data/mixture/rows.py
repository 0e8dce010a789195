"""Rows: sentences as tokens, as training examples of C inputs and C targets.

`concat`: the sentences of a mixture, each BOS + codes + EOS, make one stream of tokens. Row r holds tokens
r·C … r·C+C, and neighbours share one token, so that every token but the first is a target once.

`whole`: a row holds whole sentences and PAD, and no sentence sees another.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.mixture.mixture import Mixture
from lvm.data.mixture.packing import BestFitPacker, ConcatPacker, Spans
from lvm.data.store.format import DamagedError
from lvm.model.vocabulary import Vocabulary


def to_tokens(codes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Sentences' codes int [..., grids, N] → tokens int32 [..., grids·N (+2)], in BOS and EOS if there are."""
    parts = [codes.reshape(*codes.shape[:-2], -1)]
    edge = np.ones((*codes.shape[:-2], 1), np.int32)
    if vocabulary.bos is not None:
        parts.insert(0, vocabulary.bos * edge)
    if vocabulary.eos is not None:
        parts.append(vocabulary.eos * edge)
    return np.concatenate(parts, axis=-1, dtype=np.int32)


def batch_spec(batch_size: int, context: int, whole: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch: rows of `context` inputs, `whole` where no sentence of a row sees another."""
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
      vocabulary: the specials around them.
      context: C, inputs a row.
      batch_size: rows a global batch.

    Attributes:
      mixture, vocabulary, context: as given.
      lengths: int64 [components], tokens of a sentence.
      packing: where sentences lie in rows.
      skipped: damaged record, as its error names it → (component, number) of the sentences skipped for it.

    Raises:
      UserError: `whole` with sentences that are longer than a row or a vocabulary without PAD; a loss on
        answers alone with a component that has none.
    """

    def __init__(self, mixture: Mixture, vocabulary: Vocabulary, context: int, batch_size: int):
        if batch_size < 1:
            raise UserError(f"config.batch_size: {batch_size} is not positive")
        self.mixture, self.vocabulary, self.context = mixture, vocabulary, context
        self._batch_size = batch_size
        self.skipped: dict[str, set[tuple[int, int]]] = {}
        self._whole = mixture.config.packing == "whole"
        specials = (vocabulary.bos is not None) + (vocabulary.eos is not None)
        N = mixture.stores[0].codes_per_image
        self.sentence_lengths = np.array(
            [s.recipe.num_grids * N + specials for s in mixture.components], np.int64
        )
        _check_answers(mixture)
        if self._whole:
            _check_pad(vocabulary)
            self.sentence_lengths = _shortened(mixture, self.sentence_lengths, vocabulary, context)
        self.packer: ConcatPacker | BestFitPacker = (BestFitPacker if self._whole else ConcatPacker)(
            mixture, self.sentence_lengths, context
        )

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return batch_spec(self._batch_size, self.context, self._whole)

    def batch(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The global batch at `step`: rows step·B … step·B + B − 1, by `batch_spec`.

        `component_ids` tells each target's component, −1 for PAD.

        Args:
          step: from 0 on.
          rows: int [n], which rows of the batch to read and return, in this order; None takes all B.
        """
        places = np.arange(self._batch_size) if rows is None else np.asarray(rows)
        if len(places) and not 0 <= places.min() <= places.max() < self._batch_size:
            raise ValueError(f"rows {places.min()}…{places.max()} are not in a batch of {self._batch_size}")
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        made = [self._run(step * self._batch_size + int(run[0]), len(run)) for run in runs if len(run)]
        if not made:
            return {name: np.zeros((0, *x.shape[1:]), x.dtype) for name, x in self.batch_spec.items()}
        return (
            made[0]
            if len(made) == 1
            else {name: np.concatenate([part[name] for part in made]) for name in made[0]}
        )

    def spans(self, row: int) -> Spans:
        """What row `number` is made of."""
        return self.packer.spans(row, 1)

    def sentences_read(self, steps: int) -> list[int]:
        """How many sentences of each component the first `steps` batches read, to the end of a block."""
        return self.mixture.sentences_before(
            self.packer.block_of_row(max(0, steps * self._batch_size - 1)) + 1
        )

    def check_repetitions(self, steps: int) -> None:
        """Raises UserError where so many batches repeat a component more often than its `max_repetitions`."""
        for component, count in zip(self.mixture.components, self.sentences_read(steps), strict=True):
            component.check_repetitions(count)

    def summary(self) -> list[str]:
        """What a user should know of each component: an epoch in rows, and what is lost, a line each."""
        N, lines = self.mixture.stores[0].codes_per_image, []
        for component, length in zip(self.mixture.components, self.sentence_lengths.tolist(), strict=True):
            tokens, sentences = component.sentences_per_epoch * length, component.sentences_per_epoch
            if self._whole:
                a_row = (self.context + 1) // length
                rows, rest = divmod(sentences, a_row)
                line = f"{rows} rows of {a_row} and {rest} sentences"
            else:
                rows, rest = divmod(tokens - 1, self.context)
                line = f"{rows} rows and {rest} tokens"
            line = f"{component.name}: {sentences} sentences an epoch, by themselves {line}"
            full = component.recipe.num_grids * N + len(self._specials())
            if length < full:
                line += f"; all {sentences} lose their EOS: they have {full} tokens, a row {self.context + 1}"
            if component.num_excluded:
                line += f"; {component.num_excluded} scenes excluded: too short, a stream missing, or class too small"
            lines.append(line)
        return lines

    def _specials(self) -> list[int]:
        return [x for x in (self.vocabulary.bos, self.vocabulary.eos) if x is not None]

    def _run(self, first: int, count: int) -> dict[str, np.ndarray]:
        """The rows [first, first + count), by `batch_spec`."""
        C, spans = self.context, self.packer.spans(first, count)
        tokens, learned = self._lay(spans)

        def cut(flat: np.ndarray) -> np.ndarray:  # → [count, C + 1]
            return np.lib.stride_tricks.sliding_window_view(flat, C + 1)[:: self.packer.stride]

        def spread(values: np.ndarray) -> np.ndarray:
            return cut(np.repeat(values, spans.lengths))

        batch = {
            "tokens": cut(tokens).copy(),
            "loss_mask": cut(learned)[:, 1:].copy(),
            "component_ids": spread(spans.component_ids)[:, 1:].copy(),
        }
        if not self._whole:
            return batch | {"positions": np.broadcast_to(np.arange(C, dtype=np.int32), (count, C))}
        positions = np.arange(len(tokens), dtype=np.int32)
        ends = np.cumsum(spans.lengths)
        positions -= np.repeat((ends - spans.lengths).astype(np.int32), spans.lengths)
        for end, length in zip(
            ends[spans.segment_ids == 0], spans.lengths[spans.segment_ids == 0], strict=True
        ):
            positions[end - length : end] = 0
        return batch | {
            "segment_ids": spread(spans.segment_ids)[:, :C].copy(),
            "positions": cut(positions)[:, :C].copy(),
        }

    def _lay(self, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of spans, int32 [n], and which of them are learned, bool [n]."""
        ends = np.cumsum(spans.lengths)
        pad = self.vocabulary.pad or 0
        tokens = np.full(ends[-1], pad, np.int32)
        learned = np.zeros(len(tokens), bool)
        for component in np.unique(spans.component_ids[spans.component_ids >= 0]).tolist():
            mine = np.flatnonzero(spans.component_ids == component)
            numbers, which = np.unique(spans.sentence_ids[mine], return_inverse=True)
            sentences, damaged = self._readable(component, numbers)
            template = self._learned(component)
            stops, lengths = ends[mine].tolist(), spans.lengths[mine].tolist()
            for i, stop, length, first in zip(
                which, stops, lengths, spans.offsets[mine].tolist(), strict=True
            ):
                if damaged[i]:
                    continue
                tokens[stop - length : stop] = sentences[i, first : first + length]
                learned[stop - length : stop] = template[first : first + length]
        return tokens, learned

    def _readable(self, component: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n, length] of a component's sentences, and bool [n]: damaged, to be skipped.

        Raises:
          DamagedError: a record is damaged, and `skip_damaged` isn't set.
        """
        try:
            return self._sentences(component, numbers), np.zeros(len(numbers), bool)
        except DamagedError:
            if not self.mixture.config.skip_damaged:
                raise
        tokens = np.zeros((len(numbers), self.sentence_lengths[component] + 1), np.int32)
        damaged = np.zeros(len(numbers), bool)
        for place, number in enumerate(numbers):
            try:
                found = self._sentences(component, numbers[place : place + 1])[0]
                tokens[place, : len(found)] = found[: tokens.shape[1]]
            except DamagedError as error:
                damaged[place] = True
                self._skip(str(error), (component, int(number)))
        return tokens, damaged

    def _skip(self, reason: str, sentence: tuple[int, int]) -> None:
        first = reason not in self.skipped
        self.skipped.setdefault(reason, set()).add(sentence)
        if first:
            count = len(set().union(*self.skipped.values()))
            log_info(f"skipped: {reason} ({len(self.skipped)} damaged records, {count} sentences until now)")

    def _sentences(self, component: int, numbers: np.ndarray) -> np.ndarray:
        """Tokens int32 [n, length] of a component's sentences at `numbers`."""
        part = self.mixture.components[component]
        part.check_repetitions(int(numbers.max()) + 1)
        return to_tokens(part.sentences(numbers), self.vocabulary)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (it lives as long as its process)
    def _learned(self, component: int) -> np.ndarray:
        """bool [length]: the tokens of a component's sentences that are learned."""
        recipe, N = self.mixture.components[component].recipe, self.mixture.stores[0].codes_per_image
        learned = np.ones(self.sentence_lengths[component], bool)
        if self.mixture.config.loss == "answers":
            before = self.vocabulary.bos is not None
            learned = np.pad(np.repeat(recipe.answer_mask, N), (before, 1))[: len(learned)]
        if self._whole:
            learned[0] = False  # no token of its segment stands before it
        return learned


def _check_answers(mixture: Mixture) -> None:
    without = [component.name for component in mixture.components if not component.recipe.answer_mask.any()]
    if mixture.config.loss == "answers" and without:
        raise UserError(
            f"config.data.loss: 'answers', but the sentences of {', '.join(without)} are one image and answer nothing; "
            "give them weight 0 or choose 'all'"
        )


def _check_pad(vocabulary: Vocabulary) -> None:
    if vocabulary.pad is None:
        raise UserError("config.data.packing: 'whole' fills rows with PAD, and the vocabulary has none")


def _shortened(mixture: Mixture, lengths: np.ndarray, vocabulary: Vocabulary, context: int) -> np.ndarray:
    """The lengths of sentences in rows: one token too many costs the EOS, more are an error."""
    room = context + 1 + (vocabulary.eos is not None)
    for component, length in zip(mixture.components, lengths.tolist(), strict=True):
        if length > room:
            raise UserError(
                f"config.data.components.{component.name}: a sentence of its recipe ({component.recipe.kind}, "
                f"{component.recipe.num_grids} grids) has {length} tokens, a row of config.model.context {context} has "
                f"{room} at most; shorten the recipe, or choose config.data.packing 'concat'"
            )
    return np.minimum(lengths, context + 1)
