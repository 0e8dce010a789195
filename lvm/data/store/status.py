"""State of a store that processes are encoding: shards, images, rate and time left over all of them, claims."""

import time
from collections import Counter

from etils import epath

from lvm.common import files
from lvm.common.claims import late_claims
from lvm.common.logging import duration
from lvm.data.store import failures, writer
from lvm.data.store.format import shard_name
from lvm.data.store.manifest import HEADER, MANIFEST
from lvm.data.store.shard_queue import CLAIMS

_WINDOW_S = 1800.0  # over which the rate is measured


def describe_progress(folder: epath.PathLike) -> list[str]:
    """Lines about an unfinished or finished store, from two listings and the entries of its complete shards.

    Raises:
      UserError: the folder has no header, or one of another version.
    """
    num_shards = writer.read_header(folder)["num_shards"]
    times = files.times(folder)
    missing = set(writer.missing_shards(folder, num_shards))
    complete = [i for i in range(num_shards) if shard_name(i, num_shards) not in missing]
    now = max(time.time(), *times.values())  # a storage service's clock may be ahead
    since = max(now - _WINDOW_S, times[HEADER])
    images, recent_images, recent_shards, reasons = 0, 0, 0, Counter[str]()
    for i, entry in zip(complete, writer.read_entries(folder, complete, num_shards), strict=True):
        images += entry.get("images", 0)  # {}: a malformed entry, which `finish_store` names
        reasons.update(entry.get("failures", {}))
        if times.get(f"{shard_name(i, num_shards)}.json", now) >= since:
            recent_shards, recent_images = recent_shards + 1, recent_images + entry.get("images", 0)
    state = f"{len(complete)} of {num_shards} shards, {images:,} images"
    if missing and recent_shards:
        seconds = max(now - since, 1.0)
        left_s = len(missing) * seconds / recent_shards
        state += f"; {recent_images / seconds:,.3g} images/s in the last {duration(seconds)}, {duration(left_s)} left"
    elif missing:
        state += f"; no shard was completed in the last {duration(now - since)}"
    else:
        state += (
            "; finished" if MANIFEST in times else f"; {MANIFEST} is missing: tokenizer.encode --finish --out={folder}"
        )
    return [f"{folder}: {state}", *_describe_claims(folder), *failures.describe(folder, failures.most_common(reasons))]


def count_complete(folder: epath.PathLike) -> int:
    """Number of complete shards of a store; 0 if it isn't begun."""
    if not (epath.Path(folder) / HEADER).exists():
        return 0
    num_shards = writer.read_header(folder)["num_shards"]
    return num_shards - len(writer.missing_shards(folder, num_shards))


def _describe_claims(folder: epath.PathLike) -> list[str]:
    count, late = late_claims(epath.Path(folder) / CLAIMS)
    if not count:
        return []
    line = f"{count} shards are claimed, {len(late)} of the claims stale" + (":" if late else "")
    return [line, *(f"  {item}: {owner}, last renewed {duration(age_s)} ago" for item, (age_s, owner) in late.items())]
