"""Prompt a model with images and write its answer as images.

    lvm prompt --model=M --tokenizer=T --sequence a.png b.png --out=answer.png            next frames
    lvm prompt --model=M --tokenizer=T --sequence clip.mp4 --frames=4 --out=answer.png
    lvm prompt --model=M --tokenizer=T --pairs x1.png:y1.png x2.png:y2.png --query=q.png --out=answer.png
    lvm prompt --model=M --tokenizer=T --pairs x1.png:y1.png+z1.png … --query=q.png       two tasks at once
    lvm prompt --model=M --tokenizer=T --pairs photos:masks --query=q.png                 folders, matched by name

Writes a contact sheet of prompt and answers, and beside it a folder of the same name with each answer and, for a
sequence, a video.
"""

import functools
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from lvm.common import cli, files
from lvm.common.errors import UserError
from lvm.common.png import encode_png
from lvm.data.images.sources.listing import VIDEO_SUFFIXES, suffix_of
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference import prompts
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer import Tokenizer

_ANSWER_FILE = re.compile(r"candidate-\d+(-image-\d+\.png|\.mp4)")
_MIN_SHEET_SIDE = 96  # pixels of an image on the sheet


def check_flags(args: cli.Args) -> None:
    """Raises UserError unless the flags give one prompt, and each of the others has an effect on it."""
    if bool(args.sequence) == bool(args.pairs):
        raise UserError("give either --sequence a.png b.png …, or --pairs x.png:y.png … with --query=q.png")
    if args.sequence and args.query:
        raise UserError("--query goes with --pairs, not with --sequence")
    if args.pairs and not args.query:
        raise UserError("--pairs needs --query=IMAGE, the image to answer for")
    members = [path for pair in args.pairs for member in prompts.split_example(pair) for path in member]
    paths = [pathlib.Path(path) for path in (*args.sequence, *members, args.query) if path]
    has_video = any(suffix_of(path) in VIDEO_SUFFIXES for path in paths)
    if args.rate and not has_video:
        raise UserError(f"--rate={args.rate:g} applies to videos, and the prompt has none")
    if args.frames and not has_video and not any(path.is_dir() for path in paths):
        raise UserError(f"--frames={args.frames} applies to folders and videos, and the prompt has none")
    is_set = {"candidates": args.candidates > 1} | {name: args[name].present for name in ("top_k", "top_p", "seed")}
    for name, value in is_set.items():
        if value and not args.temperature:
            raise UserError(f"--{name} has no effect with --temperature=0 (greedy); give a temperature, such as 1")
    if pathlib.Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out={args.out} must end in .png")
    if args.tensor > jax.device_count():
        raise UserError(f"--tensor={args.tensor} exceeds the {jax.device_count()} devices")


def write_answers(
    out: epath.Path, prompt: prompts.Prompt, answers: UInt8[np.ndarray, "C A R R 3"], is_sequence: bool
) -> None:
    """Writes the contact sheet, and beside it a folder with each answer and, for a sequence, videos."""
    folder = out.parent / out.stem
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("candidate-*"):
        if _ANSWER_FILE.fullmatch(path.name):  # of an earlier prompt
            path.unlink()
    for c, candidate in enumerate(answers, 1):
        for i, image in enumerate(candidate, 1):
            files.write_atomically(folder / f"candidate-{c}-image-{i}.png", encode_png(image))
        if is_sequence:
            video = prompts.encode_mp4(np.concatenate([prompt.images, candidate]))
            files.write_atomically(folder / f"candidate-{c}.mp4", video)
    side = max(_MIN_SHEET_SIDE, prompt.images.shape[1])
    files.write_atomically(out, encode_png(prompts.answer_sheet(prompt, answers, side)))


def _run(args: cli.Args) -> None:
    check_flags(args)
    out = epath.Path(args.out)
    mesh = make_mesh(MeshConfig(data=1, tensor=args.tensor), jax.devices()[: args.tensor])
    tokenizer, model = Tokenizer.load(args.tokenizer), LVM.load(args.model, mesh=mesh)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, tokenizer.identity(), args.tokenizer)
    check = functools.partial(model.check_fits, codes_per_image=tokenizer.codes_per_image)
    reader = prompts.PromptReader(tokenizer.read_image, tokenizer.preprocess, args.rate, args.frames, check)
    prompt = reader.read_sequence(args.sequence) if args.sequence else reader.read_pairs(args.pairs, args.query)
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
    flags.string("model", None, "model folder", required=True)
    flags.string("tokenizer", None, "tokenizer folder", required=True)
    flags.strings("sequence", "images, folders and videos to continue")
    flags.strings("pairs", "examples image.png:answer.png")
    flags.string("query", "", "the image to answer for, after --pairs")
    flags.string("out", None, "PNG file for the contact sheet of prompt and answers", required=True)
    flags.integer("num_images", 0, "images per answer; 0: one, or as many as the examples have", lower_bound=0)
    flags.integer("candidates", 1, "answers to sample", lower_bound=1)
    flags.float("temperature", 0.0, "sampling temperature; 0 is greedy", lower_bound=0)
    flags.integer("top_k", 0, "sample from the k most likely codes; 0: all", lower_bound=0)
    flags.float("top_p", 1.0, "sample from the smallest set of codes with this total probability")
    flags.integer("seed", 0, "sampling seed")
    flags.integer("drop", 0, "oldest images dropped when the context is full; 0: half", lower_bound=0)
    flags.integer("frames", 0, "use only the first N frames of a folder or video; 0: all", lower_bound=0)
    flags.float("rate", 0.0, "frames per second taken of a video; 0: all", lower_bound=0)
    flags.integer("tensor", 1, "devices for tensor parallelism", lower_bound=1)
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
