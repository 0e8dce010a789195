"""Scenes of a source, decoded or as codes, and failures."""

import dataclasses

import numpy as np
from jaxtyping import UInt8, UInt16


@dataclasses.dataclass(frozen=True)
class Failure:
    """Data that is not used, and why."""

    key: str  # a path inside the source, a scene, or a frame of a scene
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class SceneInfo:
    """Metadata of a scene, known without decoding."""

    key: str  # identifies the scene within its source
    group: str  # the original photo or video; a split never separates scenes of one group
    class_name: str  # class label, or ""
    num_frames: int  # T
    streams: tuple[str, ...]  # in the order of the scene's images


@dataclasses.dataclass(frozen=True)
class SceneImages:
    """A decoded scene."""

    info: SceneInfo  # `num_frames` counts the frames in `images`
    images: UInt8[np.ndarray, "T S R R 3"]  # streams in the order of `info.streams`; T may be 0
    failures: tuple[Failure, ...] = ()  # frames that could not be read and were dropped


@dataclasses.dataclass(frozen=True)
class SceneCodes:
    """A scene that is stored as codes; otherwise as `SceneImages`."""

    info: SceneInfo
    codes: UInt16[np.ndarray, "T S N"]
    failures: tuple[Failure, ...] = ()
