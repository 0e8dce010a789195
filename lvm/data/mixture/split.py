"""The held-out split: by the hash of a scene's group, so an original image or video is never on both sides."""

from __future__ import annotations

import hashlib

import numpy as np

from lvm.common.errors import UserError


def group_hash(group: str) -> int:
    """A 64-bit hash of a group's name, the same everywhere and forever."""
    return content_hash(group.encode())


def content_hash(content: bytes) -> int:
    """A 64-bit hash of bytes, the same everywhere and forever."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def heldout_mask(hashes: np.ndarray, fraction: float, extremes: tuple[int, int] | None = None) -> np.ndarray:
    """Which scenes are held out.

    A group is held out when its hash lies in the lowest `fraction` of all 64-bit numbers. Where there are so
    few groups that this leaves one side empty, the group with the lowest hash alone is held out.

    Args:
      hashes: uint64 [n], each scene's `group_hash`.
      fraction: in [0, 1); 0 holds nothing out.
      extremes: the lowest and the highest hash of the whole source, where `hashes` may lack some of its groups
        (those that could not be read): the rule must be the same for all who ask.

    Returns:
      bool [n].

    Raises:
      UserError: a fraction outside [0, 1), no scenes, or a single group, which can't be on two sides.
    """
    check_fraction(fraction)
    if fraction == 0:
        return np.zeros(len(hashes), bool)
    if not len(hashes):
        raise UserError("heldout_fraction: there are no scenes to hold any out of")
    lowest, highest = extremes or (int(hashes.min()), int(hashes.max()))
    threshold = int(fraction * 2**64)
    if lowest < threshold <= highest:
        return hashes < np.uint64(threshold)
    if lowest == highest:
        raise UserError(
            "heldout_fraction: all scenes belong to one image or video, so none can be held out; "
            "at least two are needed"
        )
    return hashes == np.uint64(lowest)


def check_fraction(fraction: float) -> None:
    """Raises UserError where a share of the groups is none."""
    if not 0 <= fraction < 1:
        raise UserError(f"heldout_fraction: {fraction} is not in [0, 1)")
