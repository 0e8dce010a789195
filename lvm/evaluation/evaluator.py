"""The evaluator protocol, and the context that evaluators run in."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Integer

from lvm.common import distributed
from lvm.common.errors import UserError
from lvm.common.logging import Progress, log_info, log_warning
from lvm.data.images.sources import ImageSource
from lvm.data.mixture.mixture import Mixture, MixtureConfig
from lvm.data.store.manifest import same_codes
from lvm.evaluation import likelihood
from lvm.evaluation.figures import Figure, Picture
from lvm.evaluation.heldout import Heldout
from lvm.evaluation.image_metrics import Compare
from lvm.evaluation.likelihood import Groups
from lvm.inference.pretrained import LVM
from lvm.training.evaluator import EvaluatorConfig, Stopping

Sentences = Integer[np.ndarray, "B G N"]
Result = tuple[list[Figure], list[Picture]]
_LOG_EVERY_S = 10.0


class NotApplicableError(Exception):
    """An evaluation that the data don't allow, such as one of a stream that no scene has; the message is the reason."""


class StoppedError(Exception):
    """The run is to end: its evaluation is given up."""


class Evaluator(EvaluatorConfig, abc.ABC):
    """An evaluation: a frozen dataclass of its settings with `run`, in the module of the name `kind`.

    Attributes:
      needs_images: whether it reads images of held-out scenes, not only codes of a store.
    """

    needs_images: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, context: Context) -> Result:
        """Returns figures and pictures, a pure function of the settings and the context.

        Raises:
          NotApplicableError: the data don't allow it.
          UserError: a setting doesn't fit the model or the data.
        """


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The parts of a tokenizer that evaluations use.

    Attributes:
      encode: images uint8 [B, R, R, 3] → codes int32 [B, N].
      decode: codes int [B, N] → images uint8 [B, R, R, 3].
      identity: as in manifests.
      num_codes: size of the codebook.
      codes_per_image: N.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    identity: dict[str, Any]
    num_codes: int
    codes_per_image: int

    @classmethod
    def of(cls, tokenizer: Any, batch_size: int) -> Tokenizer:
        """Those of a `tokenizer.Tokenizer`; all devices of all processes share the images of a call."""
        encode = functools.partial(tokenizer.encode, batch_size=batch_size)
        decode = functools.partial(tokenizer.decode, batch_size=batch_size)
        return cls(
            functools.partial(distributed.map_rows, encode),
            functools.partial(distributed.map_rows, decode),
            tokenizer.identity(),
            tokenizer.config.codebook_size,
            tokenizer.codes_per_image,
        )


class Context:
    """A model with its tokenizer and its held-out data, and what evaluators share.

    Args:
      model: the transformer; another one of the same shapes may take its place (`with_model`).
      tokenizer: of the model's codes.
      mixture: of training.
      source: an image source, whose held-out scenes are read and encoded at first use; None without one.
      unseen: training saw no scene of `source`: all of them are held out.
      max_scenes: upper limit on held-out scenes.
      seed: of sentences, episodes and sampling.
      folders: name → folder with the metrics of a training run, such as the model's.
      batch_size: images of a call of the tokenizer and prompts of a call of the model; figures don't depend on it.
      lpips: images and true images uint8 [B, R, R, 3] → LPIPS of each; None without its weights.
      stopping: asked between batches by all processes alike; once true, `StoppedError` is raised.
    """

    def __init__(
        self,
        model: LVM,
        tokenizer: Tokenizer,
        mixture: MixtureConfig,
        source: ImageSource | None = None,
        unseen: bool = False,
        max_scenes: int = 256,
        seed: int = 0,
        folders: Mapping[str, str] | None = None,
        batch_size: int = 64,
        lpips: Compare | None = None,
        stopping: Stopping = lambda: False,
    ):
        self.model, self.tokenizer, self.mixture, self.source = model, tokenizer, mixture, source
        self.unseen, self.max_scenes, self.seed, self.batch_size = unseen, max_scenes, seed, batch_size
        self.folders, self.lpips, self.stopping = folders or {}, lpips, stopping
        self.cache: dict[Any, Any] = {}  # of results that several evaluators use, of this model
        self.sentence_cache: dict[Any, dict[str, tuple[Sentences, Groups]]] = {}  # of any model
        self.episodes: Any = None  # questions that the running evaluator asks, as JSON, to be stored with its figures

    def with_model(self, model: LVM, stopping: Stopping) -> Context:
        """The context of another model; held-out scenes and sentences are shared."""
        if self.source is not None:
            _ = self.heldout  # so that it is shared
        context = Context.__new__(Context)
        context.__dict__.update(self.__dict__, model=model, stopping=stopping, cache={})
        return context

    @property
    def images_in_context(self) -> int:
        """Images, prompt and answer together, that fit the model's context."""
        return self.model.max_images(self.tokenizer.codes_per_image)

    @functools.cached_property
    def heldout(self) -> Heldout:
        """The held-out scenes of the image source. Raises UserError if there are none."""
        if self.source is None:
            raise UserError("no image source: evaluations of images need the held-out scenes of one")
        fraction = None if self.unseen else self.mixture.heldout_fraction
        heldout = Heldout(self.source, fraction, self.max_scenes, self.tokenizer.encode)
        log_info(f"{len(heldout.scenes)} held-out scenes of {self.source.name}")
        return heldout

    def batches(self, count: int, unit: str) -> Iterator[slice]:
        """Slices of `batch_size` of `count` items, with a line of progress every ten seconds.

        Raises:
          StoppedError: the run is to end.
        """
        progress, logged_at = Progress(count, unit=unit), time.monotonic()
        for start in range(0, count, self.batch_size):
            if self.stopping():
                raise StoppedError
            yield slice(start, min(start + self.batch_size, count))
            if time.monotonic() - logged_at > _LOG_EVERY_S:
                log_info(progress.line(min(start + self.batch_size, count)))
                logged_at = time.monotonic()

    def sentences(self, count: int, data: MixtureConfig | None = None) -> dict[str, Sentences]:
        """`count` held-out sentences of each component that fit the context.

        Args:
          count: sentences of each component.
          data: a mixture whose stores' held-out sentences are taken. Without one they are sampled from the held-out
            scenes of the image source, or read from the stores of training if there is no source.

        Raises:
          UserError: a store of another tokenizer.
        """
        return {name: codes for name, (codes, _) in self._sentences_with_groups(count, data).items()}

    def sentence_groups(self, count: int, data: MixtureConfig | None = None) -> dict[str, Groups]:
        """The group hash of each image of `sentences`."""
        return {name: groups for name, (_, groups) in self._sentences_with_groups(count, data).items()}

    def _sentences_with_groups(self, count: int, data: MixtureConfig | None) -> dict[str, tuple[Sentences, Groups]]:
        key = (count, str(data))
        if key not in self.sentence_cache:
            in_store = data or (None if self.source else self.mixture)
            sampled = self._stored_sentences(in_store, count) if in_store else self._sample_sentences(count)
            self.sentence_cache[key] = sampled
        return self.sentence_cache[key]

    def losses(self, count: int, data: MixtureConfig | None = None) -> dict[str, likelihood.Losses]:
        """Losses in nats of each code of `sentences`."""
        key = ("losses", count, str(data))
        if key not in self.cache:
            sentences = self.sentences(count, data)
            log_info(f"likelihood of {count} sentences each of {', '.join(sentences) or 'nothing'}")
            losses = {}
            for name, codes in sentences.items():
                parts = [likelihood.grid_losses(self.model, codes[rows]) for rows in self.batches(len(codes), name)]
                losses[name] = np.concatenate(parts)
            self.cache[key] = losses
        return self.cache[key]

    def sentence_digests(self, count: int, data: MixtureConfig | None = None) -> dict[str, str]:
        """Digests of `sentences`, as the episodes of evaluations of them."""
        sentences = self.sentences(count, data)
        return {name: hashlib.sha256(np.int32(codes).tobytes()).hexdigest()[:16] for name, codes in sentences.items()}

    def _sample_sentences(self, count: int) -> dict[str, tuple[Sentences, Groups]]:
        sentences = {}
        for index, (name, component) in enumerate(self.mixture.components.items()):
            if component.weight > 0 and self._fits(name, component.recipe.num_grids):
                sampled = self.heldout.sentences(component.recipe, count, self.seed + index)
                if sampled is not None:
                    sentences[name] = sampled
        return sentences

    def _stored_sentences(self, data: MixtureConfig, count: int) -> dict[str, tuple[Sentences, Groups]]:
        seen = set(self.model.record["stores"])
        mixture = Mixture(data, self.seed, "heldout" if data.heldout_fraction else "train")
        for store in mixture.stores:
            tokenizer = store.manifest["tokenizer"]
            if not same_codes(tokenizer, self.tokenizer.identity):
                raise UserError(f"{store.path}: codes of tokenizer {tokenizer['hash'][:12]}, not of the model's")
            if not data.heldout_fraction and store.identity() in seen:
                raise UserError(f"{store.path}: the model was trained on it; heldout_fraction must be that of training")
        indices = np.arange(count)
        return {
            component.name: (component.sentences(indices).astype(np.int32), component.groups(indices))
            for component in mixture.components
            if self._fits(component.name, component.recipe.num_grids)
        }

    def _fits(self, name: str, num_images: int) -> bool:
        fits = num_images <= self.images_in_context
        if not fits:
            log_warning(f"no likelihood of {name}: its sentences of {num_images} images exceed the context")
        return fits
