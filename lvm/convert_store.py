"""Convert a store of version 3 to the flat one of version 4, without encoding again.

    lvm convert-store OLD NEW
    lvm convert-store OLD NEW --shard=3/8      the fourth of eight independent processes

Shard after shard, each read back and compared before it counts as complete; existing shards are skipped. The order of
scenes stays. If OLD isn't finished, or a shard is damaged, `tokenizer.encode --out=NEW` with the settings of OLD
encodes what is missing.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lvm.common import cli, files
from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.data.store import staging, version3, writer
from lvm.data.store.format import Scene, shard_name
from lvm.data.store.shards import Shard, StoreIds
from tokenizer.encode import finish, parse_shard_flag

_COUNTS = ("scenes", "images", "group_hashes")
_MERGED = ("classes", "stream_sets")  # of a header of version 3; entries of version 4 have them


def convert_store(old: epath.Path, new: epath.Path, process: int = 0, num_processes: int = 1) -> None:
    """Converts every `num_processes`-th shard, from shard `process` on, that OLD has and NEW lacks.

    Raises:
      UserError: OLD isn't a store of version 3, or is damaged; NEW is something else.
    """
    header = version3.read_header(old)
    num_shards = header.pop("num_shards")
    new_header = {key: value for key, value in header.items() if key not in _MERGED}
    writer.begin_store(new, new_header, num_shards)
    for shard in range(process, num_shards, num_processes):
        if writer.read_shard_entry(new, shard, num_shards) is not None:
            continue
        if (entry := writer.read_shard_entry(old, shard, num_shards)) is None:
            log_info(f"{old}: {shard_name(shard, num_shards)} is missing; tokenizer.encode --out={new} writes it")
            continue
        with _local_folder(old, entry) as folder:
            _convert_shard(folder, entry, new, shard, header, num_shards)
        log_info(f"{shard_name(shard, num_shards)}: {entry['scenes']} scenes converted and compared")


@contextlib.contextmanager
def _local_folder(old: epath.Path, entry: Mapping[str, Any]) -> Iterator[epath.Path]:
    """A local folder of a shard's files: the store itself, or one that its files are copied to."""
    if not files.is_remote(old):
        yield old
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, expected in entry["files"].items():
            staging.stage(old / name, expected, epath.Path(folder))
        yield epath.Path(folder)


def _convert_shard(
    folder: epath.Path, old: Mapping[str, Any], new: epath.Path, shard: int, header: Mapping[str, Any], num_shards: int
) -> None:
    height, width = header["tokenizer"]["grid"]

    def read() -> Iterator[Scene]:
        return version3.read_scenes(folder, old, header)

    def verify(entry: Mapping[str, Any], locate: Callable[[str], epath.Path]) -> None:
        name = f"{new / entry['name']}"
        if wrong := [key for key in _COUNTS if entry[key] != old[key]]:
            raise UserError(f"{name}: {', '.join(wrong)} differ from the entry's in {folder}; encode the shard again")
        converted = Shard(name, entry, height * width, StoreIds({}, {}), locate)
        if converted.section("histogram").tolist() != old["histogram"]:
            raise UserError(f"{name}: histogram differs from the entry's in {folder}; encode the shard again")
        for i, scene in enumerate(read()):
            if not _are_equal(scene, converted.scene(i)):
                raise UserError(f"{name}: scene {scene.key!r} was not written as it was read: a fault of the disk?")

    skipped = writer.SkippedItems(old["failures"], old["group_hashes"])
    num_codes = header["tokenizer"]["num_codes"]
    writer.write_shard(new, shard, num_shards, read(), num_codes, skipped, old["versions"], verify=verify)


def _are_equal(a: Scene, b: Scene) -> bool:
    fields = ("key", "class_name", "streams", "group")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and np.array_equal(a.codes, b.codes)


def _run(args: cli.Args) -> None:
    process, num_processes = parse_shard_flag(args.shard) if args.shard else (0, 1)
    convert_store(epath.Path(args.old), epath.Path(args.new), process, num_processes)
    finish(args.new)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__, positionals=("old", "new"))
    flags.string("old", None, "store of version 3, local or gs://; also as the first argument", required=True)
    flags.string("new", None, "store to write, local or gs://; also as the second argument", required=True)
    flags.string("shard", "", "i/n: convert the share of process i, from 0, of n independent processes")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
