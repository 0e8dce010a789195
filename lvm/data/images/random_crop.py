"""Random resized crops and flips of training images, and the preprocess that takes one crop."""

import dataclasses
import math

from lvm.common.errors import UserError
from lvm.common.validation import check_non_negative, check_tuples
from lvm.data.images.preprocess import Number, Preprocess

NUM_SAMPLES = 5  # random numbers of an augmented image: aspect ratio, area, left, top, flip


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Settings of random resized crops.

    A window is sampled and scaled to the model's resolution: its aspect ratio log-uniformly, then its area uniformly
    among those that fit into the image, then its place. (torchvision's RandomResizedCrop samples area and ratio
    independently, and after ten windows that don't fit takes one in the center.)

    Attributes:
      scale: least and greatest area of a window as shares of the image's.
      aspect: least and greatest width / height of a window in pixels.
      flip: mirrors half of the images, each by its stream's codec.
      min_side: images with a shorter side, in pixels, are skipped; 0 takes all, scaled up if need be.

    Raises:
      UserError: an impossible value, such as a window that is larger than the image.
    """

    scale: tuple[float, ...] = (0.8, 1.0)
    aspect: tuple[float, ...] = (3 / 4, 4 / 3)
    flip: bool = True
    min_side: int = 0

    def __post_init__(self) -> None:
        check_tuples(self, "scale", "aspect")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale={self.scale} must be two shares of an image's area, 0 < least <= greatest <= 1")
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"aspect={self.aspect} must be two ratios of width to height, 0 < least <= greatest")
        check_non_negative(self, "min_side")


@dataclasses.dataclass(frozen=True)
class Crop(Preprocess):
    """A preprocess that keeps one window of each image: the same share of all streams of a scene.

    With the resizer "swscale" a window begins and ends at whole pixels, even ones at its upper left: those of a JPEG's
    halved color planes.

    Attributes:
      settings: of the random crop.
      samples: uniform random numbers in [0, 1): of aspect ratio, area, left and top.
    """

    settings: RandomCrop = dataclasses.field(default_factory=RandomCrop)
    samples: tuple[float, ...] = (0.5,) * 4

    @property
    def render_side(self) -> int:
        left, top, right, bottom = self._window(1.0, 1.0)
        return math.ceil(self.resolution / min(right - left, bottom - top))

    def min_decode_side(self, size: tuple[int, int]) -> int:
        if self.decode != "reduced":
            return 0
        least = float(min(size))
        for width, height in (size, size[::-1]):  # it may be turned when it is decoded
            left, top, right, bottom = self._window(width, height)
            least = min(least, (right - left) * min(size) / width, (bottom - top) * min(size) / height)
        return math.ceil(self.resolution * min(size) / least)

    def crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns left, top, right and bottom of the window in an image, as the resizer "swscale" has them."""
        left, top, right, bottom = map(int, self._crop_box(width, height))
        return left, top, right, bottom

    def _crop_box(self, width: Number, height: Number) -> tuple[Number, Number, Number, Number]:
        if min(width, height) < self.settings.min_side:
            raise UserError(f"{width:g}×{height:g} is smaller than min_side={self.settings.min_side}")
        left, top, right, bottom = self._window(width, height)
        if self.resizer == "pillow":
            return left, top, right, bottom
        left, top = math.floor(left / 2) * 2, math.floor(top / 2) * 2
        return left, top, min(math.ceil(width), round(right)), min(math.ceil(height), round(bottom))

    def _window(self, width: Number, height: Number) -> tuple[float, float, float, float]:
        settings, (aspect, area, x, y) = self.settings, self.samples
        low, high = map(math.log, settings.aspect)
        ratio = math.exp(low + aspect * (high - low))
        full_width = min(width, height * ratio)  # of the largest window of this ratio
        fitting = full_width**2 / ratio / (width * height)
        least, greatest = (min(share, fitting) for share in settings.scale)
        scale = math.sqrt((least + area * (greatest - least)) / fitting)
        w = min(width, max(2, scale * full_width))
        h = min(height, max(2, scale * full_width / ratio))
        left, top = x * (width - w), y * (height - h)
        return left, top, min(width, left + w), min(height, top + h)
