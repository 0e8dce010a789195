"""Prompt a model with images and write its answer as images.

    lvm prompt --model=M --tokenizer=T --sequence a.png b.png --out=answer.png            next frames
    lvm prompt --model=M --tokenizer=T --sequence clip.mp4 --frames=4 --out=answer.png
    lvm prompt --model=M --tokenizer=T --pairs x1.png:y1.png x2.png:y2.png --query=q.png --out=answer.png
    lvm prompt --model=M --tokenizer=T --pairs x1.png:y1.png+z1.png … --query=q.png       two tasks at once
    lvm prompt --model=M --tokenizer=T --pairs photos:masks --query=q.png                 folders, matched by name

Writes a contact sheet of prompt and answers, and beside it a folder of the same name with each answer and, for a
sequence, a video.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from lvm.common import cli, files
from lvm.common.errors import UserError
from lvm.common.png import encode_png
from lvm.data.images.sources.listing import VIDEO_SUFFIXES
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference import prompts
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

_ANSWER = re.compile(r"candidate-\d+(-image-\d+\.png|\.mp4)")  # what `write_answers` puts beside the sheet
_SHEET_SIDE = 96  # pixels of an image on the sheet, at least


def check_prompt_flags(sequence: list[str], pairs: list[str], query: str) -> None:
    """That the flags are one kind of prompt.

    Raises:
      UserError: no prompt, two kinds of prompt at once, or pairs without a query.
    """
    if bool(sequence) == bool(pairs):
        raise UserError("give either --sequence a.png b.png …, or --pairs x.png:y.png … with --query=q.png")
    if sequence and query:
        raise UserError("--query goes with --pairs, not with --sequence")
    if pairs and not query:
        raise UserError("--pairs needs --query=IMAGE, the image to answer for")


def check_video_flags(paths: Sequence[str], rate: float, frames: int) -> None:
    """That what is said of videos and folders is said where there are some. Raises UserError."""
    has_video = any(pathlib.Path(path).suffix.lower() in VIDEO_SUFFIXES for path in paths)
    if rate and not has_video:
        raise UserError(f"--rate={rate:g} is of videos, and the prompt has none")
    if frames and not has_video and not any(pathlib.Path(path).is_dir() for path in paths):
        raise UserError(f"--frames={frames} is of folders and videos, and the prompt has none")


def check_sampling_flags(temperature: float, drawn_by: Mapping[str, bool]) -> None:
    """That nothing is said of drawing where nothing is drawn: flag → whether it was said. Raises UserError."""
    said = [name for name, is_said in drawn_by.items() if is_said]
    if said and not temperature:
        raise UserError(
            f"--{said[0]}: with --temperature=0, the default, the likeliest codes are taken and every answer is the "
            "same; give a temperature, such as 1"
        )


def write_answers(out: epath.Path, prompt: prompts.Prompt, answers: np.ndarray, is_sequence: bool) -> None:
    """Writes the sheet, and beside it a folder with each answer of uint8 [C, A, R, R, 3] and videos."""
    folder = out.parent / out.stem
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("candidate-*"):  # of a prompt before
        if _ANSWER.fullmatch(old.name):
            old.unlink()
    for number, candidate in enumerate(answers, 1):
        for place, image in enumerate(candidate, 1):
            files.write_atomically(folder / f"candidate-{number}-image-{place}.png", encode_png(image))
        if is_sequence:
            moving = prompts.encode_mp4(np.concatenate([prompt.images, candidate]))
            files.write_atomically(folder / f"candidate-{number}.mp4", moving)
    side = max(_SHEET_SIDE, prompt.images.shape[1])
    files.write_atomically(out, encode_png(prompts.answer_sheet(prompt, answers, side)))


def _run(args: cli.Args) -> None:
    check_prompt_flags(args.sequence, args.pairs, args.query)
    paths = [part for pair in args.pairs for member in pair.split(":") for part in member.split("+")]
    query = [args.query] if args.query else []
    check_video_flags([*args.sequence, *paths, *query], args.rate, args.frames)
    drawn_by = {"candidates": args.candidates > 1} | {
        name: bool(args[name].present) for name in ("top_k", "top_p", "seed")
    }
    check_sampling_flags(args.temperature, drawn_by)
    out = epath.Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: {out} is not a name of a picture; wanted one that ends in .png")
    if args.tensor > jax.device_count():
        raise UserError(f"--tensor: {args.tensor} devices wanted, there are {jax.device_count()}")
    mesh = make_mesh(MeshConfig(data=1, tensor=args.tensor), jax.devices()[: args.tensor])
    tokenizer, model = Tokenizer.load(args.tokenizer), LVM.load(args.model, mesh=mesh)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), args.tokenizer)
    N = tokenizer.codes_per_image
    check = lambda count: model.check_fits(count, N)  # noqa: E731
    reader = prompts.PromptReader(tokenizer.read_image, tokenizer.preprocess, args.rate, args.frames, check)
    prompt = reader.sequence(args.sequence) if args.sequence else reader.pairs(args.pairs, args.query)
    check(len(prompt.images))
    num_images = args.num_images or prompt.num_answers
    codes = model.generate(
        tokenizer.encode(prompt.images)[None],
        num_images,
        candidates=args.candidates,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        drop=args.drop,
    )
    images = tokenizer.decode(codes.reshape(args.candidates * num_images, -1))
    write_answers(out, prompt, images.reshape(-1, num_images, *images.shape[1:]), bool(args.sequence))
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("model", None, "a model's folder", required=True)
    flags.string("tokenizer", None, "its tokenizer's folder", required=True)
    flags.strings("sequence", "images, folders and videos to continue")
    flags.strings("pairs", "examples, image.png:answer.png")
    flags.string("query", "", "the image to answer for, after --pairs")
    flags.string("out", None, "the picture to write: the prompt and its answers", required=True)
    flags.integer("num_images", 0, "images to answer with; 0: one, or as the examples have", lower_bound=0)
    flags.integer("candidates", 1, "answers to give", lower_bound=1)
    flags.float("temperature", 0.0, "0 takes the most likely code each time", lower_bound=0)
    flags.integer("top_k", 0, "draw among the k most likely codes; 0 is all", lower_bound=0)
    flags.float("top_p", 1.0, "draw among codes of that much probability")
    flags.integer("seed", 0, "of the drawing")
    flags.integer("drop", 0, "oldest images dropped when the context is full; 0: half", lower_bound=0)
    flags.integer("frames", 0, "of a folder or video, its first so many; 0: all", lower_bound=0)
    flags.float("rate", 0.0, "frames a second taken of a video; 0: all", lower_bound=0)
    flags.integer("tensor", 1, "devices that share the model", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
