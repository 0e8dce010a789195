"""Video continuation: the frames after a prompt of frames, against the true ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from lvm.common import statistics
from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_positive
from lvm.data.mixture.recipes import Video
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError, Result
from lvm.evaluation.figures import Figure, Picture, Plot, estimate
from lvm.evaluation.prompted import GREEDY, generate
from lvm.inference.contact_sheet import Cell, answer_row, render_sheet
from lvm.inference.sampling import SamplingParams

_MAX_VIDEOS = 4  # in the picture
Videos = UInt8[np.ndarray, "B T H W 3"]


@dataclasses.dataclass(frozen=True)
class VideoContinuation(Evaluator):
    """Frames of held-out videos at the smallest stride of the mixture's video recipe, continued by the model.

    Attributes:
      component: of the mixture, with a video recipe; "" takes the first.
      prompt: frames that are given; 0 is half of the recipe's.
      num_queries: videos, over all held-out ones in turn.
      sampling: of answers; greedy by default.
    """

    kind = "video"

    component: str = ""
    prompt: int = 0
    num_queries: int = 64
    sampling: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative(self, "prompt")
        check_positive(self, "num_queries")

    def run(self, context: Context) -> Result:
        recipe, (truth, codes) = self._recipe(context), self._videos(context)
        length = truth.shape[1]
        prompt = self.prompt or max(1, length // 2)
        _, answers = generate(context, codes[:, :prompt], length - prompt, self.sampling, "videos")
        decoded = context.tokenizer.decode(codes.reshape(-1, codes.shape[-1])).reshape(truth.shape)
        expected = truth[:, prompt:]
        candidates = {
            "model": answers,
            "last frame": np.repeat(truth[:, prompt - 1 : prompt], length - prompt, axis=1),
            "mean of the prompt": np.repeat(
                np.rint(truth[:, :prompt].mean(1, keepdims=True)).astype(np.uint8), length - prompt, axis=1
            ),
            "ceiling": decoded[:, prompt:],
        }
        psnr = {name: _by_frame(statistics.psnr, videos, expected) for name, videos in candidates.items()}  # [B, T]
        means = {name: estimate(values.mean(1)) for name, values in psnr.items()}
        model, ceiling = means.pop("model"), means.pop("ceiling")
        text = f"PSNR of {length - prompt} frames after {prompt}, mean over frames; {len(truth)} videos"
        figures = [Figure("psnr", model, text, "dB", True, means, ceiling)]
        return figures, [
            _frames_plot(psnr, prompt),
            _sheet(decoded, answers, prompt, recipe),
        ]

    def _recipe(self, context: Context) -> Video:
        components = context.mixture.components
        if self.component and self.component not in components:
            raise UserError(f"component={self.component!r} must be one of {', '.join(components)}")
        names = [self.component] if self.component else list(components)
        videos = [
            r for name in names if isinstance(r := components[name].recipe, Video) and components[name].weight > 0
        ]
        if not videos:
            raise NotApplicableError("the mixture has no videos")
        recipe = videos[0]
        if not self.prompt < recipe.frames:
            raise UserError(f"prompt={self.prompt} must be below the {recipe.frames} frames of the recipe")
        if recipe.frames > context.images_in_context:
            raise NotApplicableError(f"videos of {recipe.frames} frames exceed the context")
        return recipe

    def _videos(self, context: Context) -> tuple[Videos, Integer[np.ndarray, "B T N"]]:
        """True frames of the queries, and their codes."""
        recipe, stride = self._recipe(context), min(self._recipe(context).strides)
        scenes = context.heldout.with_streams([recipe.stream], recipe.min_frames)
        if not scenes or recipe.frames < 2:
            raise NotApplicableError(f"no held-out video of {recipe.stream} has {recipe.min_frames} frames")
        images, codes, episodes = [], [], []
        for index in range(self.num_queries):
            scene = scenes[index % len(scenes)]
            rng = np.random.default_rng([context.seed, index])
            start = int(rng.integers(len(scene.images) - recipe.min_frames + 1))
            frames, column = start + stride * np.arange(recipe.frames), scene.info.streams.index(recipe.stream)
            images.append(scene.images[frames, column])
            codes.append(scene.codes[frames, column])
            episodes.append([scene.info.key, start, stride])
        context.episodes = episodes
        return np.stack(images), np.stack(codes)


def _by_frame(metric: Callable[..., np.ndarray], videos: Videos, truth: Videos) -> np.ndarray:
    """A metric of images, of each frame, [B, T]."""
    B, T = videos.shape[:2]
    flat = (x.reshape(B * T, *x.shape[2:]) for x in (videos, truth))
    return metric(*flat).reshape(B, T)


def _frames_plot(psnr: Mapping[str, np.ndarray], prompt: int) -> Picture:
    series: dict[str, Sequence[tuple[float, ...]]] = {}
    for name, values in psnr.items():
        by_frame = [estimate(values[:, i]) for i in range(values.shape[1])]
        series[name] = [(float(prompt + i + 1), x.value, *(x.interval or ())) for i, x in enumerate(by_frame)]
    text = "PSNR of each frame after the prompt; bands are 95 % intervals."
    return Picture("Video, by frame", text, Plot(series, "frame", "PSNR in dB"))


def _sheet(truth: Videos, answers: UInt8[np.ndarray, "B A H W 3"], prompt: int, recipe: Video) -> Picture:
    rows: list[Sequence[Cell | None]] = []
    for i in range(0, len(truth), max(1, len(truth) // _MAX_VIDEOS))[:_MAX_VIDEOS]:
        rows.append([Cell(image, f"frame {t + 1}") for t, image in enumerate(truth[i])])
        rows.append(answer_row(prompt, answers[i]))
    text = (
        f"The first {prompt} frames are the prompt, {min(recipe.strides)} apart. Above: the true frames, through the "
        "tokenizer. Below, framed: the model's continuation."
    )
    return Picture("Video, continued", text, render_sheet(rows))
