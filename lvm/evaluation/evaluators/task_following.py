"""Task-following accuracy: the share of answers of the kind of image that the examples show."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvm.common.errors import UserError
from lvm.common.validation import check_positive, check_tuples
from lvm.data.mixture.recipes import Pairs
from lvm.evaluation.episodes import Images, Query, describe_shortage, make_queries
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Estimate, Figure, estimate, format_count
from lvm.evaluation.prompted import GREEDY, ask
from lvm.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class TaskFollowing(Evaluator):
    """Asks the same queries for several annotations, and classifies each answer as one of these or the input.

    By codes: a unigram model of each stream's held-out codes (the kind of image). By pixels: the stream whose true
    image of the query is nearest by squared error (the right content as well).

    Attributes:
      input: stream of the queries.
      targets: streams that are asked for; by default those of the mixture's pairs.
      shots, num_queries: of each target; equal to those of other prompted tasks, answers are shared.
      same_original: examples may be other scenes of the query's original.
      sampling: of answers; greedy by default.
    """

    kind = "task_following"

    input: str = "rgb"
    targets: tuple[str, ...] = ()
    shots: int = 2
    num_queries: int = 128
    same_original: bool = False
    sampling: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "shots", "num_queries")
        check_tuples(self, "targets")
        if len(self.targets) == 1 or self.input in self.targets:
            raise UserError(f"targets={self.targets} must be two streams or more, without input={self.input!r}")

    def run(self, context: Context) -> Result:
        heldout, targets = context.heldout, self._targets(context)
        scenes = heldout.with_streams([self.input, *targets])
        queries = make_queries(scenes, self.num_queries, self.shots, context.seed, same_original=self.same_original)
        if len(targets) < 2:
            raise NotApplicableError(f"{len(targets)} kinds of annotation; two are needed")
        if not queries:
            raise NotApplicableError(describe_shortage(scenes, self.shots, same_original=self.same_original))
        context.episodes = [query.to_json() for query in queries]
        streams = [self.input, *targets]
        size = context.model.vocabulary.num_codes
        counts = [np.bincount(heldout.codes(stream).ravel(), minlength=size) + 0.5 for stream in streams]
        log_probs = np.stack([np.log(c / c.sum()) for c in counts])  # [streams, num_codes]

        def classify(codes: np.ndarray) -> np.ndarray:
            return np.argmax(log_probs[:, codes].sum(-1), axis=0)  # codes [B, N] → stream indices [B]

        by_codes, by_pixels, judged = {}, {}, {}
        for target in targets:
            expected = streams.index(target)
            codes, images = ask(context, queries, self.input, target, self.sampling)
            by_codes[target] = classify(codes) == expected
            by_pixels[target] = _nearest_stream(images, queries, streams) == expected
            truth = np.stack([query.scene.grid(query.frame, target) for query in queries])
            judged[target] = classify(truth) == expected

        def mean(shares: dict[str, np.ndarray]) -> np.ndarray:
            return np.mean([shares[target] for target in targets], axis=0)  # of each query

        chance = {"chance level": Estimate(1 / len(streams))}
        groups = [query.group for query in queries]
        count = format_count("queries", groups)
        text = f"answers of the kind that the examples show, by codes; {count}, for {len(targets)} kinds"
        ceiling = estimate(mean(judged), groups=groups)
        figures = [Figure("by_codes", estimate(mean(by_codes), groups=groups), text, "%", True, chance, ceiling)]
        for target in targets:
            shares = estimate(by_codes[target].astype(float), groups=groups)
            figures.append(Figure(f"by_codes/{target}", shares, f"of {target}, by codes", "%", True, chance))
        text = "answers nearest to the right annotation of the query, by pixels"
        figures.append(Figure("by_pixels", estimate(mean(by_pixels), groups=groups), text, "%", True, chance))
        return figures, []

    def _targets(self, context: Context) -> Sequence[str]:
        if self.targets:
            return self.targets
        pairs = [c.recipe for c in context.mixture.components.values() if isinstance(c.recipe, Pairs) and c.weight > 0]
        targets = dict.fromkeys(recipe.target for recipe in pairs if recipe.input == self.input)
        return [target for target in targets if context.heldout.with_streams([self.input, target])]


def _nearest_stream(images: Images, queries: Sequence[Query], streams: Sequence[str]) -> np.ndarray:
    """Index of the stream whose true image is nearest to each answer, [B]."""
    distances = []
    for stream in streams:
        truth = np.stack([query.scene.image(query.frame, stream) for query in queries])
        distances.append(np.mean((images.astype(np.float64) - truth) ** 2, axis=(1, 2, 3)))
    return np.argmin(distances, axis=0)
