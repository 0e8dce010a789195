"""Serve a web page to prompt a model interactively.

    lvm playground --model=MODEL --tokenizer=TOKENIZER

Prints the address to open. Drop example pairs and a query, or frames of a sequence, and watch the answer being
generated. Needs `pip install ".[playground]"`; listens on localhost only.
"""

import functools
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
from lvm.inference.prompts import Prompt, PromptReader, pairs_prompt
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

MAX_FILES, MAX_FILE_SIZE = 32, "8mb"  # per upload
_UPDATES_PER_IMAGE = 8
_GRAY = 225  # of image areas without codes yet
_SIZE = 128  # pixels of an image on the page
_SEED = 20_000_003  # of the example scenes; unlikely to be a training seed
_TASKS = ("segmentation", "depth", "edges")
_ABOUT = """## Prompt with images
Give pairs of images and a query, or the first frames of a sequence. The model continues in kind;
nothing else names the task."""

Paths = list[str] | None
Answers = list[tuple[np.ndarray, str]]  # images uint8 [H, W, 3] with captions, as `gr.Gallery` takes them


class PlaygroundSession:
    """Reads uploads, prompts the model and renders its answer while it is generated."""

    def __init__(self, model: LVM, tokenizer: Tokenizer):
        self._model, self._tokenizer = model, tokenizer
        check = functools.partial(model.check_fits, codes_per_image=tokenizer.codes_per_image)
        self._reader = PromptReader(tokenizer.read_image, tokenizer.preprocess, check_count=check)
        self.max_images = model.max_images(tokenizer.codes_per_image)

    def pairs(self, xs: Paths, ys: Paths, query: str | None) -> Prompt:
        """Prompt of example images, their answers in the same order, and a query."""
        xs, ys = check_uploads(xs, "example images"), check_uploads(ys, "their answers")
        if len(xs) != len(ys) or not xs:
            raise UserError(f"{len(xs)} example images and {len(ys)} answers; give the same number, at least one")
        if not query:
            raise UserError("no query; give the image to answer for")
        read = self._reader.read_image
        return pairs_prompt([[read(x), read(y)] for x, y in zip(xs, ys, strict=True)], read(query))

    def sequence(self, frames: Paths) -> Prompt:
        """Prompt of the first frames of a sequence."""
        if not (frames := check_uploads(frames, "frames")):
            raise UserError("no frames; give at least one")
        return self._reader.read_sequence(frames)

    def answer(
        self, prompt: Prompt, num_images: int, candidates: int, sampling: SamplingParams, seed: int
    ) -> Iterator[tuple[np.ndarray, Answers]]:
        """Yields the rendered prompt with the answers so far."""
        N = self._tokenizer.codes_per_image
        self._model.check_fits(len(prompt.images), N)
        cells = [Cell(image, label) for label, image in zip(prompt.labels, prompt.images, strict=True)]
        sheet = render_sheet([cells[start : start + 6] for start in range(0, len(cells), 6)], _SIZE)
        yield sheet, []
        grids = self._tokenizer.encode(prompt.images)[None]
        every = max(1, N // _UPDATES_PER_IMAGE)
        for codes in self._model.stream(grids, num_images, candidates, sampling, seed, every=every):
            yield sheet, self._render(codes[0])

    def _render(self, codes: np.ndarray) -> Answers:
        """Decodes the codes int [C, n] so far; image areas without codes are gray."""
        N, grid = self._tokenizer.codes_per_image, self._tokenizer.config.grid
        candidates, count = codes.shape
        num_images = -(-count // N)
        padded = np.pad(codes, ((0, 0), (0, num_images * N - count)))
        images = self._tokenizer.decode(padded.reshape(-1, N))  # [C·num_images, R, R, 3]
        has_code = (np.arange(num_images * N) < count).reshape(num_images, *grid)
        patch = images.shape[1] // grid[0], images.shape[2] // grid[1]
        mask = has_code.repeat(patch[0], 1).repeat(patch[1], 2)[..., None]  # [num_images, R, R, 1]
        images = np.where(np.tile(mask, (candidates, 1, 1, 1)), images, np.uint8(_GRAY))
        scale = max(1, _SIZE // images.shape[1])
        images = images.repeat(scale, 1).repeat(scale, 2)
        captions = [f"{c + 1}.{i + 1}" if num_images > 1 else f"{c + 1}" for c, i in np.ndindex(candidates, num_images)]
        return list(zip(images, captions, strict=True))


def check_uploads(paths: Paths, kind: str) -> list[str]:
    """Returns the uploaded files. Raises UserError for too many."""
    if paths and len(paths) > MAX_FILES:
        raise UserError(f"{len(paths)} {kind}; at most {MAX_FILES} at once")
    return list(paths or [])


def write_examples(folder: pathlib.Path, tokenizer: Tokenizer, max_images: int) -> dict[str, list[list[str]]]:
    """Writes images of generated scenes; returns paths [images, answers, [query]] per task, and "video" → [frames]."""
    shots = max(1, min(4, (max_images - 2) // 2))
    source = GeneratedSource(
        tokenizer.preprocess, seed=_SEED, num_scenes=shots + 1, num_frames=8, streams=("rgb", *_TASKS)
    )
    scenes = [source.load(index) for index in range(shots + 1)]

    def save(index: int, frame: int, stream: str) -> str:
        path = folder / f"scene-{index + 1}-frame-{frame + 1}-{stream}.png"
        scene = scenes[index]
        Image.fromarray(scene.images[frame, scene.info.streams.index(stream)]).save(path)
        return str(path)

    xs = [save(index, 0, "rgb") for index in range(shots + 1)]
    examples = {task: [xs[:shots], [save(i, 0, task) for i in range(shots)], xs[shots:]] for task in _TASKS}
    frames = [save(shots, frame, "rgb") for frame in range(max(1, min(4, max_images // 2)))]
    return examples | {"video": [frames]}


def build_page(session: PlaygroundSession, examples: dict[str, list[list[str]]]) -> Any:
    """The Gradio page."""
    import gradio as gr

    def answer(read_prompt: Callable[..., Prompt]) -> Callable[..., Iterator[tuple[np.ndarray, Answers]]]:
        def run(*values: Any) -> Iterator[tuple[np.ndarray, Answers]]:
            *files, num_images, candidates, temperature, top_k, top_p, seed = values
            try:
                sampling = SamplingParams(float(temperature), int(top_k or 0), float(top_p))
                prompt = read_prompt(*files)
                yield from session.answer(prompt, int(num_images), int(candidates), sampling, int(seed or 0))
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
                            try_buttons = [(name, gr.Button(f"Try {name}", size="sm")) for name in _TASKS]
                        ask = gr.Button("Answer the query", variant="primary", elem_id="ask")
                    with gr.Tab("Sequence"):
                        frames = upload("Frames, in order", "frames")
                        video = gr.Button("Try frames of a video", size="sm")
                        continue_button = gr.Button("Continue the sequence", variant="primary", elem_id="continue")
                with gr.Row():
                    num_images = gr.Slider(1, max(2, session.max_images), 1, step=1, label="Images to generate")
                    candidates = gr.Slider(1, 4, 1, step=1, label="Answers")
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                    seed = gr.Number(0, precision=0, label="Seed")
                with gr.Row():
                    top_k = gr.Number(0, precision=0, minimum=0, label="Top-k (0: all)")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            with gr.Column(scale=1):
                gr.Markdown("The prompt, as the model sees it")
                prompt_sheet = gr.Image(show_label=False, interactive=False, buttons=["download"], elem_id="prompt")
                gr.Markdown("The answer, as it is generated")
                answers = gr.Gallery(
                    show_label=False, columns=4, fit_columns=False, object_fit="contain", elem_id="answers"
                )
                stop = gr.Button("Stop", size="sm")
        settings = [num_images, candidates, temperature, top_k, top_p, seed]
        running: Any = [
            ask.click(answer(session.pairs), [xs, ys, query, *settings], [prompt_sheet, answers]),
            continue_button.click(answer(session.sequence), [frames, *settings], [prompt_sheet, answers]),
        ]
        stop.click(None, cancels=running)
        for name, button in try_buttons:
            images, targets, (query_path,) = examples[name]
            button.click(lambda paths=(images, targets, query_path): paths, None, [xs, ys, query])
        video.click(lambda: examples["video"][0], None, frames)
    return page.queue(max_size=8, default_concurrency_limit=1)


def _run(args: cli.Args) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("gradio isn't installed: pip install '.[playground]'") from error
    tokenizer, model = Tokenizer.load(args.tokenizer), LVM.load(args.model)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), args.tokenizer)
    session = PlaygroundSession(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(session, write_examples(pathlib.Path(folder), tokenizer, session.max_images))
        # System fonts: the default ones are loaded from the network.
        theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
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
            raise UserError(f"--port={args.port} is not available: {error}") from error
        print(f"open {address}")
        page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("model", None, "model folder", required=True)
    flags.string("tokenizer", None, "tokenizer folder", required=True)
    flags.integer("port", 0, "local port; 0: any free one", lower_bound=0, upper_bound=65535)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
