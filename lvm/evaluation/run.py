"""Runs evaluators one after the other, and keeps the results of each in a folder: a finished one isn't run again."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from lvm.common import distributed, files
from lvm.common.config import to_json
from lvm.common.errors import UserError
from lvm.common.logging import log_info, log_warning
from lvm.common.png import encode_png
from lvm.evaluation.evaluator import Context, Evaluator, NotApplicableError
from lvm.evaluation.figures import Plot
from lvm.evaluation.plots import plot_curves

FOLDER = "evaluations"
# Of all figures: results of another one are computed again. From 3 on intervals are over originals.
_VERSION = 3


def run_evaluations(
    evaluations: Mapping[str, Evaluator], context: Context, out: epath.PathLike, request: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Runs the evaluators that `out` has no results of for this request; returns the records of all.

    A record is `evaluations/NAME.json`: the settings, the figures, the files of the pictures, the questions that were
    asked, or the reason why the evaluation was skipped. Bootstrap resamples are in `NAME.npz`. All processes must call
    this.

    Raises:
      UserError: a setting doesn't fit the model or the data; names the evaluation.
    """
    folder = epath.Path(out)
    if distributed.is_first():
        for name in (FOLDER, "pictures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (name, evaluator) in enumerate(evaluations.items(), 1):
        path = folder / FOLDER / f"{name}.json"
        settings = {key: value for key, value in to_json(evaluator).items() if key != "every"}
        digest = _digest({"evaluator": settings, "of": request, "version": _VERSION})
        done = distributed.is_first() and files.read_side_file(path).get("request") == digest
        if distributed.broadcast(int(done)):
            log_info(f"{name} is up to date")
            continue
        log_info(f"{name} ({number}/{len(evaluations)})")
        record = {"request": digest, "version": _VERSION, "evaluator": settings}
        record |= _run(name, evaluator, context, folder)
        if distributed.is_first():
            files.write_json(path, record)
    distributed.broadcast(0)  # written before any process reads
    return {name: files.read_json(folder / FOLDER / f"{name}.json") for name in evaluations}


def _run(name: str, evaluator: Evaluator, context: Context, folder: epath.Path) -> dict[str, Any]:
    context.episodes = None
    try:
        figures, pictures = evaluator.run(context)
    except NotApplicableError as error:
        log_warning(f"{name} is skipped: {error}")
        return {"skipped": str(error)}
    except UserError as error:
        raise UserError(f"config.evaluations.{name}: {error}") from error
    if distributed.is_first():
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {k: v for figure in figures for k, v in figure.resamples().items()}
        np.savez_compressed(buffer, **arrays)
        files.write_atomically(folder / FOLDER / f"{name}.npz", buffer.getvalue())
    shown = []
    for picture in pictures:
        file, content = f"pictures/{name}-{picture.name}.png", picture.content
        plot = {"plot": to_json(content)} if isinstance(content, Plot) else {}
        shown.append({"title": picture.title, "text": picture.text, "file": file, **plot})
        if distributed.is_first():
            png = plot_curves(content) if isinstance(content, Plot) else encode_png(content)
            files.write_atomically(folder / file, png)
    return {
        "figures": {figure.name: figure.to_json() for figure in figures},
        "pictures": shown,
        "episodes": context.episodes,
        "heldout_scenes": len(context.heldout.scenes) if evaluator.needs_images else None,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(files.json_bytes(value)).hexdigest()
