"""Demo of the whole system: trains a small tokenizer and transformer and answers a prompt of images.

    python -m scripts.demo                      generated scenes
    python -m scripts.demo --images=FOLDER      your own images

Runs the user's commands in order and prints each. A demo that was killed resumes when it is started again.
"""

import hashlib
import os
import pathlib
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lvm.common import cli, files
from lvm.common.logging import duration, log_warning
from lvm.data.images.preprocess import Preprocess
from lvm.data.images.sources import open_source
from lvm.data.mixture import split
from lvm.data.store.reader import Store

_HELDOUT = 0.15
_VIDEO_SHARE = 0.3  # share of video sentences where there are annotations too
_FRAMES = 8  # frames of a demo video
_MAX_EPOCHS = 15  # over user images
_OUTPUTS = (
    "tokenizer",
    "store",
    "lvm",
    "prompt",
    "pictures",
    "evaluations",
    "index.html",
    "results.json",
    "answer.png",
    "answer",
)


def stage(title: str, module: str, *arguments: str) -> None:
    """Runs a command of the project and exits with its exit code if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    print(f"\n== {title}\n$ {shlex.join(['python', *command[1:]])}")
    start = time.monotonic()
    # The stage ends with the demo: an orphan would keep its workdir locked.
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, cli.PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env=environment)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))  # a stage saves
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the stage has received it, too
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)
    print(f"({duration(time.monotonic() - start)})")


def output_folder(images: str) -> pathlib.Path:
    """`runs/demo`, or a folder named after the path of the user's images."""
    if not images:
        return pathlib.Path("runs/demo")
    path = pathlib.Path(images).resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return pathlib.Path(f"runs/demo-{path.name}-{digest}")


def mixture_flags(store: Store) -> list[str]:
    """Component weights that fit the streams of a store; training skips components without scenes."""
    annotations = [name for name in store.streams if name != "rgb"]
    has_video = bool((store.index["frames"] >= _FRAMES).any())
    weights = {"video": _VIDEO_SHARE if annotations else 1.0} if has_video else {}
    weights |= {name: (1 - weights.get("video", 0.0)) / len(annotations) for name in annotations}
    weights = weights or {"single": 1.0}
    components = ["video", "segmentation", "depth", "edges", "normals", "boxes", "pose", "single"]
    flags = [f"--config.data.components.{name}.weight={weights.get(name, 0.0)}" for name in components]
    return [*flags, "--config.data.allow_missing=true"]


def steps_flag(store: Store, config: str) -> list[str]:
    """Limits the number of steps to `_MAX_EPOCHS` over a small folder, which would be memorized otherwise."""
    chosen = runpy.run_path(config)["get_config"]()
    images = store.manifest["images"]
    max_steps = images * _MAX_EPOCHS // (chosen.batch_size * _FRAMES)
    steps = min(chosen.loop.total_steps, max(max_steps, 2 * chosen.optimizer.warmup_steps + 1))
    return [f"--config.loop.total_steps={steps}"]


def images_that_fit(model: pathlib.Path) -> int:
    """Number of images that fit into a trained model's context."""
    record = files.read_json(model / "config.json")
    height, width = record["tokenizer"]["grid"]
    return record["config"]["model"]["context"] // (height * width)


def write_prompt(spec: str, resolution: int, folder: pathlib.Path, frames: int) -> list[str]:
    """Writes the first frames of a held-out video as PNG files; returns their paths, none without such a video."""
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


def warn_if_not_below_unigram(out: pathlib.Path) -> None:
    """Warns if the model is no better than the frequencies of codes."""
    loss = files.read_json(out / "results.json")["figures"].get("likelihood", {}).get("loss")
    if loss is None:
        return
    unigram = loss["baselines"]["unigram entropy of the same codes"]["value"]
    if loss["value"] >= unigram:
        log_warning(
            f"the held-out loss, {loss['value']:.3f} nats, is not below the unigram entropy of the held-out codes, "
            f"{unigram:.3f}: the model's answers mean little; more images or more steps are needed"
        )


def remove_outputs(folder: pathlib.Path) -> None:
    """Removes the outputs of an earlier demo and no other file of the folder."""
    for name in _OUTPUTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    print(f"removed the outputs of an earlier demo in {folder}")


def _lock(folder: pathlib.Path) -> object:
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.lock_file(folder / ".lock")
    if lock is None:
        print(f"another demo is running in {folder}; waiting for it to end ...")
        lock = files.lock_file(folder / ".lock", wait=True)
    return lock


def _run(args: cli.Args) -> None:
    start = time.monotonic()
    images, out = args.images, pathlib.Path(args.out or output_folder(args.images))
    source = images or args.source
    streams = open_source(source, Preprocess(64)).streams  # fail early
    lock = _lock(out)
    if args.fresh:
        remove_outputs(out)
    tokenizer, store, model = str(out / "tokenizer"), str(out / "store"), str(out / "lvm")
    stage(
        "1/5 Train the tokenizer",
        "tokenizer.train",
        f"--config={args.tokenizer_config}",
        f"--workdir={tokenizer}",
        f"--config.data.source={source}",
        *(["--config.data.rgb_share=1"] if set(streams) == {"rgb"} else []),
        f"--config.data.heldout_fraction={_HELDOUT}",
    )
    stage(
        "2/5 Encode every image",
        "tokenizer.encode",
        f"--tokenizer={tokenizer}",
        f"--source={source}",
        f"--out={store}",
    )
    overrides = [*mixture_flags(Store(store)), *steps_flag(Store(store), args.lvm_config)] if images else []
    stage(
        "3/5 Train the transformer",
        "lvm.train",
        f"--config={args.lvm_config}",
        f"--workdir={model}",
        f"--config.data.store={store}",
        f"--config.data.heldout_fraction={_HELDOUT}",
        f"--config.tokenizer={tokenizer}",
        *overrides,
    )
    common = [f"--model={model}", f"--tokenizer={tokenizer}"]
    stage(
        "4/5 Evaluate on held-out scenes",
        "lvm.evaluate",
        f"--config={args.eval_config}",
        *common,
        f"--config.source={source}",
        f"--out={out}",
    )
    resolution = files.read_json(out / "tokenizer" / "config.json")["config"]["model"]["resolution"]
    answer, max_images = out / "answer.png", min(images_that_fit(out / "lvm"), _FRAMES)
    if answer.exists() and answer.stat().st_mtime >= (out / "results.json").stat().st_mtime:
        print(f"\n{answer} exists already")
    elif prompt := write_prompt(source, resolution, out / "prompt", max_images // 2):
        stage(
            "5/5 Answer a prompt of images",
            "lvm.prompt",
            *common,
            "--sequence",
            *prompt,
            f"--num_images={max_images - len(prompt)}",
            f"--out={answer}",
        )
    else:
        print("\nno held-out video is long enough for a prompt of frames")
    warn_if_not_below_unigram(out)
    del lock
    print(f"\nin {duration(time.monotonic() - start)}; the page:\n{out / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("images", "", "folder of your own images instead of generated scenes")
    flags.boolean("fresh", False, "remove the outputs of an earlier demo first")
    flags.string("out", "", "output folder (default: runs/demo…)")
    flags.string("source", "configs/demo_scenes.py", "config of the generated scenes")
    flags.string("tokenizer_config", "configs/demo_tokenizer.py", "config of stage 1")
    flags.string("lvm_config", "configs/demo_lvm.py", "config of stage 3")
    flags.string("eval_config", "configs/eval_demo.py", "config of stage 4")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
