"""Serve a web page to prompt a model interactively.

    lvm playground --model=MODEL --tokenizer=TOKENIZER

Prints the address to open. Drop example pairs and a query, or frames of a sequence, and watch the answer being
generated. Needs `pip install ".[playground]"`; listens on localhost only.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lvm.common import cli
from lvm.common.errors import UserError
from lvm.data.images.sources.generated import GeneratedSource
from lvm.inference.contact_sheet import Cell, render_sheet
from lvm.inference.generator import SamplingParams
from lvm.inference.pretrained import LVM
from lvm.inference.prompts import Prompt, PromptReader
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

MAX_FILES, MAX_FILE_SIZE = 32, "8mb"  # of an upload, and of each of its files
_LOOKS = 8  # at an image while it is written
_UNWRITTEN = 225  # grey
_SHOWN = 128  # pixels of an image on the page
_SEED = 20_000_003  # of the example scenes: no model is likely to have seen them
_TASKS = ("segmentation", "depth", "edges")
_ABOUT = """## Ask in images
Show pairs of images and a query, or the first frames of a sequence. The model goes on in kind;
nothing else names the task."""

Paths = list[str] | None
Answers = list[tuple[np.ndarray, str]]  # images with captions, as a gallery takes them


class PlaygroundSession:
    """What stands behind the page: reads files, asks the model, and shows what is written so far."""

    def __init__(self, model: LVM, tokenizer: Tokenizer):
        self._model, self._tokenizer = model, tokenizer
        check = lambda count: model.check_fits(count, tokenizer.codes_per_image)  # noqa: E731
        self._files = PromptReader(tokenizer.read_image, tokenizer.preprocess, check=check)
        self.fit = model.max_images(tokenizer.codes_per_image)

    def pairs(self, xs: Paths, ys: Paths, query: str | None) -> Prompt:
        """The prompt of example images, their answers in the same order, and a query."""
        xs, ys = check_uploads(xs, "example images"), check_uploads(ys, "their answers")
        if len(xs) != len(ys) or not xs:
            raise UserError(
                f"{len(xs)} example images and {len(ys)} answers; give as many of each, at least one"
            )
        if not query:
            raise UserError("no query; give the image to answer for")
        read = self._files.image
        images = [read(path) for pair in zip(xs, ys, strict=True) for path in pair]
        labels = [f"{name}{number}" for number in range(1, len(xs) + 1) for name in "xy"]
        return Prompt((*labels, "query"), np.stack([*images, read(query)]))

    def sequence(self, frames: Paths) -> Prompt:
        """The prompt of a sequence's first frames."""
        frames = check_uploads(frames, "frames")
        if not frames:
            raise UserError("no frames; give at least one")
        return self._files.sequence(frames)

    def answer(
        self,
        prompt: Prompt,
        num_images: int,
        candidates: int,
        sampling: SamplingParams,
        seed: int,
    ) -> Iterator[tuple[np.ndarray, Answers]]:
        """The prompt as a picture, with the answers as far as they are written."""
        N = self._tokenizer.codes_per_image
        self._model.check_fits(len(prompt.images), N)
        cells = [Cell(image, label) for label, image in zip(prompt.labels, prompt.images, strict=True)]
        shown = render_sheet([cells[start : start + 6] for start in range(0, len(cells), 6)], _SHOWN)
        yield shown, []
        grids = self._tokenizer.encode(prompt.images)
        for codes in self._model.stream(
            grids[None], num_images, candidates, sampling, seed, every=max(1, N // _LOOKS)
        ):
            yield shown, self._drawn(codes[0])

    def _drawn(self, codes: np.ndarray) -> Answers:
        """Codes so far int [C, n] → images, their unwritten part grey."""
        N, grid = self._tokenizer.codes_per_image, self._tokenizer.config.grid
        begun = -(-codes.shape[1] // N)
        whole = np.zeros((len(codes), begun * N), codes.dtype)
        whole[:, : codes.shape[1]] = codes
        images = self._tokenizer.decode(whole.reshape(-1, N))  # [C·begun, R, R, 3]
        is_written = (np.arange(begun * N) < codes.shape[1]).reshape(begun, *grid)
        answers = []
        for number, image in enumerate(images):
            side = image.shape[0] // grid[0], image.shape[1] // grid[1]
            written = is_written[number % begun].repeat(side[0], 0).repeat(side[1], 1)[..., None]  # [R, R, 1]
            image = np.where(written, image, np.uint8(_UNWRITTEN))
            candidate, place = number // begun + 1, number % begun + 1
            answers.append((_enlarged(image), f"{candidate}.{place}" if begun > 1 else f"{candidate}"))
        return answers


def check_uploads(paths: Paths, what: str) -> list[str]:
    """The uploaded files. Raises UserError for too many."""
    if paths and len(paths) > MAX_FILES:
        raise UserError(f"{len(paths)} {what}; at most {MAX_FILES} at once")
    return list(paths or [])


def write_examples(folder: pathlib.Path, tokenizer: Tokenizer, fit: int) -> dict[str, list[list[str]]]:
    """Pictures of generated scenes in `folder`.

    Returns:
      For each task [images, answers, [query]], and under "video" [frames].
    """
    shots = max(1, min(4, (fit - 2) // 2))
    source = GeneratedSource(
        tokenizer.preprocess, seed=_SEED, num_scenes=shots + 1, num_frames=8, streams=("rgb", *_TASKS)
    )
    scenes = [source.load(number) for number in range(shots + 1)]

    def save(number: int, frame: int, stream: str) -> str:
        path = folder / f"scene-{number + 1}-frame-{frame + 1}-{stream}.png"
        column = scenes[number].info.streams.index(stream)
        Image.fromarray(scenes[number].images[frame, column]).save(path)
        return str(path)

    xs = [save(number, 0, "rgb") for number in range(shots + 1)]
    examples = {
        task: [xs[:shots], [save(number, 0, task) for number in range(shots)], xs[shots:]] for task in _TASKS
    }
    frames = [save(shots, frame, "rgb") for frame in range(max(1, min(4, fit // 2)))]
    return examples | {"video": [frames]}


def build_page(desk: PlaygroundSession, examples: dict[str, list[list[str]]]) -> Any:
    """The page."""
    import gradio as gr

    def asked(make_prompt: Callable[..., Prompt]) -> Callable[..., Iterator[tuple[np.ndarray, Answers]]]:
        def run(*values: Any) -> Iterator[tuple[np.ndarray, Answers]]:
            *files, num_images, candidates, temperature, top_k, top_p, seed = values
            try:
                sampling = SamplingParams(float(temperature), int(top_k or 0), float(top_p))
                numbers = int(num_images), int(candidates)
                yield from desk.answer(make_prompt(*files), *numbers, sampling, int(seed or 0))
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error

        return run

    def upload(label: str, elem_id: str, count: Any = "multiple") -> Any:
        return gr.File(label=label, file_count=count, file_types=["image"], height=150, elem_id=elem_id)

    with gr.Blocks(title="LVM playground", analytics_enabled=False) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Tabs():
                    with gr.Tab("Example pairs"):
                        xs = upload("Example images, in order", "xs")
                        ys = upload("Their answers, in the same order", "ys")
                        query = upload("Query: the image to answer for", "query", "single")
                        with gr.Row():
                            tries = [(name, gr.Button(f"Try {name}", size="sm")) for name in _TASKS]
                        ask = gr.Button("Answer the query", variant="primary", elem_id="ask")
                    with gr.Tab("Sequence"):
                        frames = upload("Frames, in order", "frames")
                        video = gr.Button("Try frames of a video", size="sm")
                        go_on = gr.Button("Continue the sequence", variant="primary", elem_id="continue")
                with gr.Row():
                    num_images = gr.Slider(1, max(2, desk.fit), 1, step=1, label="Images to write")
                    candidates = gr.Slider(1, 4, 1, step=1, label="Answers")
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: likeliest)")
                    seed = gr.Number(0, precision=0, label="Seed")
                with gr.Row():
                    top_k = gr.Number(0, precision=0, minimum=0, label="Top-k (0: all)")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            with gr.Column(scale=1):
                gr.Markdown("The prompt, as the model sees it")
                shown = gr.Image(show_label=False, interactive=False, buttons=["download"], elem_id="prompt")
                gr.Markdown("The answer, as it is written")
                answers = gr.Gallery(
                    show_label=False, columns=4, fit_columns=False, object_fit="contain", elem_id="answers"
                )
                stop = gr.Button("Stop", size="sm")
        settings = [num_images, candidates, temperature, top_k, top_p, seed]
        running: Any = [
            ask.click(asked(desk.pairs), [xs, ys, query, *settings], [shown, answers]),
            go_on.click(asked(desk.sequence), [frames, *settings], [shown, answers]),
        ]
        stop.click(None, cancels=running)
        for name, button in tries:
            images, targets, (one,) = examples[name]
            button.click(lambda found=(images, targets, one): found, None, [xs, ys, query])
        video.click(lambda: examples["video"][0], None, frames)
    return page.queue(max_size=8, default_concurrency_limit=1)


def _enlarged(image: np.ndarray) -> np.ndarray:
    scale = max(1, _SHOWN // image.shape[0])
    return image.repeat(scale, 0).repeat(scale, 1)


def _run(args: cli.Args) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("gradio isn't installed: pip install '.[playground]'") from error
    tokenizer, model = Tokenizer.load(args.tokenizer), LVM.load(args.model)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), args.tokenizer)
    desk = PlaygroundSession(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(desk, write_examples(pathlib.Path(folder), tokenizer, desk.fit))
        theme = gr.themes.Soft(
            font=["system-ui", "sans-serif"], font_mono=["monospace"]
        )  # none from the network
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=args.port or None,
                max_file_size=MAX_FILE_SIZE,
                theme=theme,
                footer_links=[],
                quiet=True,
                ssr_mode=False,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--port: {args.port} can't be had: {error}") from error
        print(f"open {address}")
        page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("model", None, "a model's folder", required=True)
    flags.string("tokenizer", None, "its tokenizer's folder", required=True)
    flags.integer("port", 0, "of this machine; 0: a free one", lower_bound=0, upper_bound=65535)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
