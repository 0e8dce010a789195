"""Video continuation: the frames after a prompt of frames, against the true ones."""

import dataclasses

from lvm.data.mixture.recipes import Recipe, Video
from lvm.evaluation.continuation import Continuation


@dataclasses.dataclass(frozen=True)
class VideoContinuation(Continuation):
    """Frames at the smallest stride of the mixture's video recipe."""

    kind = "video"
    recipe_type = Video
    noun = "frame"

    def fixed(self, recipe: Recipe) -> Recipe:
        assert isinstance(recipe, Video)
        return dataclasses.replace(recipe, strides=(min(recipe.strides),))
