"""The whole system, small: trains on images and paints a prompt's answer.

    python -m scripts.demo                      generated scenes
    python -m scripts.demo --images=FOLDER      your own images

It calls the same commands that a user would, in order, and prints each. What is done is not done again: kill
it at any moment and start it once more.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lvm.common import cli, files
from lvm.common.logging import duration
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.mixture import split
from lvm.data.store.reader import Store
from lvm.evaluation.summary import metrics_table

_HELDOUT = 0.15
_VIDEO_SHARE = 0.3  # of the sentences, where there are both videos and annotations
_FRAMES = 8  # of the demo's videos
_PASSES = 15  # at most, through one's own images
_MADE = (
    "tokenizer",
    "store",
    "lvm",
    "prompt",
    "pictures",
    "index.html",
    "results.json",
    "answer.png",
    "answer",
)


def stage(title: str, module: str, *arguments: str) -> None:
    """Runs one command of the project; ends the demo with its exit code if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    print(f"\n== {title}\n$ {shlex.join(['python', *command[1:]])}")
    start = time.monotonic()
    # A stage that outlived a killed demo would hold its workdir against the next one.
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, cli.PARENT: str(os.getpid())}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)
    print(f"({duration(time.monotonic() - start)})")


def output_folder(images: str) -> pathlib.Path:
    """`runs/demo`, or for a folder of images one that its path decides."""
    if not images:
        return pathlib.Path("runs/demo")
    path = pathlib.Path(images).resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return pathlib.Path(f"runs/demo-{path.name}-{digest}")


def mixture_flags(store: Store) -> list[str]:
    """Weights of the sentences that a store of any images may allow; training leaves out what it can't make."""
    annotations = [name for name in store.streams if name != "rgb"]
    has_video = bool((store.index["frames"] >= _FRAMES).any())
    weights = {"video": _VIDEO_SHARE if annotations else 1.0} if has_video else {}
    weights |= {name: (1 - weights.get("video", 0.0)) / len(annotations) for name in annotations}
    weights = weights or {"single": 1.0}
    listed = ["video", "segmentation", "depth", "edges", "normals", "boxes", "pose", "single"]
    flags = [f"--config.data.components.{name}.weight={weights.get(name, 0.0)}" for name in listed]
    return [*flags, "--config.data.allow_missing=true"]


def steps_flag(store: Store, config: str) -> list[str]:
    """Fewer steps for few images: a small folder, gone through too often, is learned by heart."""
    chosen = runpy.run_path(config)["get_config"]()
    images = sum(shard["images"] for shard in store.manifest["shards"])
    enough = images * _PASSES // (chosen.batch_size * _FRAMES)
    steps = min(chosen.loop.total_steps, max(enough, 2 * chosen.optimizer.warmup_steps + 1))
    return [f"--config.loop.total_steps={steps}"]


def images_that_fit(model: pathlib.Path) -> int:
    """How many images the context of a trained model holds after BOS."""
    record = files.read_json(model / "config.json")
    height, width = record["tokenizer"]["grid"]
    return record["config"]["model"]["context"] // (height * width)


def write_prompt(spec: str, resolution: int, folder: pathlib.Path, frames: int) -> list[str]:
    """The first frames of a held-out video as PNG files; no files where there is none."""
    source = open_source(spec, Preprocess(resolution))
    infos = [source.info(i) for i in range(len(source))]
    mask = split.heldout_mask(np.array([split.group_hash(info.group) for info in infos], np.uint64), _HELDOUT)
    folder.mkdir(parents=True, exist_ok=True)
    for number in np.flatnonzero(mask):
        if infos[number].num_frames >= frames:
            scene = source.load(int(number))
            column = scene.info.streams.index("rgb")
            paths = [folder / f"frame-{t + 1}.png" for t in range(min(frames, len(scene.images)))]
            for path, image in zip(paths, scene.images[:, column], strict=False):
                Image.fromarray(image).save(path)
            return [str(path) for path in paths]
    return []


def remove_what_a_demo_made(folder: pathlib.Path) -> None:
    """Removes an earlier demo's results, and nothing else that may lie in the folder."""
    for name in _MADE:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    print(f"removed what an earlier demo made in {folder}")


def _lock(folder: pathlib.Path) -> object:
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.lock_file(folder / ".lock")
    if lock is None:
        print(f"another demo is at work in {folder}; waiting for it to end ...")
        lock = files.lock_file(folder / ".lock", wait=True)
    return lock


def _run(args: cli.Args) -> None:
    start = time.monotonic()
    images, out = args.images, pathlib.Path(args.out or output_folder(args.images))
    source = images or args.source
    open_source(source, Preprocess(64))  # a wrong folder is known before anything starts
    lock = _lock(out)
    if args.fresh:
        remove_what_a_demo_made(out)
    tokenizer, store, model = str(out / "tokenizer"), str(out / "store"), str(out / "lvm")
    stage(
        "1/5 The tokenizer learns to draw images with 64 codes",
        "tokenizer.train",
        f"--config={args.tokenizer_config}",
        f"--workdir={tokenizer}",
        f"--config.data.source={source}",
        f"--config.data.heldout_fraction={_HELDOUT}",
    )
    stage(
        "2/5 Every image becomes codes, once",
        "tokenizer.encode",
        f"--tokenizer={tokenizer}",
        f"--source={source}",
        f"--out={store}",
    )
    adapted = [*mixture_flags(Store(store)), *steps_flag(Store(store), args.lvm_config)] if images else []
    stage(
        "3/5 The transformer learns the next code",
        "lvm.train",
        f"--config={args.lvm_config}",
        f"--workdir={model}",
        f"--config.data.store={store}",
        f"--config.data.heldout_fraction={_HELDOUT}",
        f"--config.tokenizer={tokenizer}",
        *adapted,
    )
    common = [f"--model={model}", f"--tokenizer={tokenizer}"]
    stage(
        "4/5 Asked on scenes it never saw",
        "lvm.evaluate",
        f"--config={args.eval_config}",
        *common,
        f"--config.source={source}",
        f"--out={out}",
    )
    resolution = files.read_json(out / "tokenizer" / "config.json")["config"]["model"]["resolution"]
    answer, fit = out / "answer.png", min(images_that_fit(out / "lvm"), _FRAMES)
    if answer.exists() and answer.stat().st_mtime >= (out / "results.json").stat().st_mtime:
        print(f"\n{answer} is there already")
    elif prompt := write_prompt(source, resolution, out / "prompt", fit // 2):
        stage(
            "5/5 A prompt of images, answered",
            "lvm.prompt",
            *common,
            "--sequence",
            *prompt,
            f"--num_images={fit - len(prompt)}",
            f"--out={answer}",
        )
    else:
        print("\nno held-out video is long enough for a prompt of frames")
    del lock
    _print_figures(out)
    print(f"\nin {duration(time.monotonic() - start)}; the page:\n{out / 'index.html'}")


def _print_figures(out: pathlib.Path) -> None:
    print("")
    for name, value, meaning in metrics_table(files.read_json(out / "results.json")):
        print(f"{name:26} {value:>11}  {meaning}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("images", "", "a folder of your own images, instead of generated scenes")
    flags.boolean("fresh", False, "remove what an earlier demo did, and start anew")
    flags.string("out", "", "where it goes; runs/demo… by default")
    flags.string("source", "configs/demo_scenes.py", "the generated scenes' config")
    flags.string("tokenizer_config", "configs/demo_tokenizer.py", "stage 1's config")
    flags.string("lvm_config", "configs/demo_lvm.py", "stage 3's config")
    flags.string("eval_config", "configs/eval_demo.py", "stage 4's config")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
