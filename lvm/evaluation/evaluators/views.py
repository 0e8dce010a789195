"""Next views of an object: those after a prompt of views around it, against the true ones."""

import dataclasses

from lvm.data.mixture.recipes import Recipe, Rotation
from lvm.evaluation.continuation import Continuation


@dataclasses.dataclass(frozen=True)
class NextViews(Continuation):
    """Views in the order of the mixture's rotation recipe, from a random one on."""

    kind = "views"
    recipe_type = Rotation
    noun = "view"

    def fixed(self, recipe: Recipe) -> Recipe:
        return recipe
