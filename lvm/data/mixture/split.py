"""The train/held-out split, by the hash of a scene's group: an original image or video is in one split only."""

import hashlib

import numpy as np
from jaxtyping import Bool, UInt64

from lvm.common.errors import UserError


def group_hash(group: str) -> int:
    """A stable 64-bit hash of a group's name."""
    return content_hash(group.encode())


def content_hash(content: bytes) -> int:
    """A stable 64-bit hash of bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def heldout_mask(
    hashes: UInt64[np.ndarray, " n"], fraction: float, extremes: tuple[int, int] | None = None
) -> Bool[np.ndarray, " n"]:
    """Marks the held-out scenes.

    A group is held out if its hash is among the lowest `fraction` of all 64-bit numbers. If that leaves a split
    empty, because there are few groups, only the group with the lowest hash is held out.

    Args:
      hashes: each scene's `group_hash`.
      fraction: in [0, 1); 0 holds nothing out.
      extremes: lowest and highest hash of the whole data set, if `hashes` may lack some of its groups, such as
        unreadable ones: every caller must apply the same rule.

    Raises:
      UserError: a fraction outside [0, 1), no scenes, or a single group, which can't be split.
    """
    check_fraction(fraction)
    if fraction == 0:
        return np.zeros(len(hashes), bool)
    if not len(hashes):
        raise UserError(f"heldout_fraction={fraction} needs scenes to hold out; there are none")
    lowest, highest = extremes or (int(hashes.min()), int(hashes.max()))
    threshold = int(fraction * 2**64)
    if lowest < threshold <= highest:
        return hashes < np.uint64(threshold)
    if lowest == highest:
        raise UserError(f"heldout_fraction={fraction} needs at least two images or videos; all scenes belong to one")
    return hashes == np.uint64(lowest)


def check_fraction(fraction: float) -> None:
    """Raises UserError unless `fraction` is in [0, 1)."""
    if not 0 <= fraction < 1:
        raise UserError(f"heldout_fraction={fraction} must be in [0, 1)")
