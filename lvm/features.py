"""Write a frozen model's features of the images of a store: arrays with an index, shard by shard.

    lvm features --model=MODEL --store=STORE --out=FOLDER
    lvm features … --pools=codes --layers=11,22       hidden states at every code, of two layers
    lvm features … --copies=2                         of the second of two copies, which has seen all of the image
    lvm features … --shard=0/8                        the first of eight groups of shards, as one task of a scheduler

For each shard of the store writes SHARD.POOL.npy, float32 or float16 [images, layers, hidden size] or, of the pool
"codes", [images, layers, codes, hidden size]; with --histogram, SHARD.histogram.npy, uint16 [images, codebook]; and
SHARD.index.parquet with key, scene, frame, class and group of each row. Existing shards are skipped. All processes that
run the same command share the shards: each claims one that is free, and takes over those of processes that have ended.
"""

import signal
from collections.abc import Sequence

import jax

from lvm.common import cli, distributed
from lvm.common.distributed import DistributedConfig
from lvm.common.errors import UserError
from lvm.data.store.reader import Store
from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference.feature_files import FeatureWriter
from lvm.inference.features import POOLS
from lvm.inference.pretrained import LVM
from lvm.interop.models import check_tokenizer
from tokenizer.encode import parse_shard_flag


def _run(args: cli.Args) -> None:
    distributed.join(DistributedConfig())
    if jax.distributed.is_initialized():
        if args.shard:
            raise UserError(f"--shard={args.shard}: joined processes share the shards without it")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler only takes note, for a step to save at
    process, num_processes = parse_shard_flag(args.shard) if args.shard else (0, 1)
    try:
        layers = [int(layer) for layer in args.layers] or None
    except ValueError as error:
        raise UserError(f"--layers={','.join(args.layers)} must be numbers, 0 of the embedding") from error
    mesh = make_mesh(MeshConfig(tensor=args.tensor), jax.local_devices())
    store, model = Store(args.store), LVM.load(args.model, mesh=mesh if mesh.size > 1 else None)
    check_tokenizer(model.record["tokenizer"], model.vocabulary, store.manifest["tokenizer"], args.store)
    writer = FeatureWriter(
        model, store, args.out, args.stream, args.pools, layers, args.copies, args.histogram, args.dtype,
        args.batch_size * mesh.shape["data"],
    )  # fmt: skip
    writer.begin()
    if args.shard:
        first, end = (writer.num_shards * i // num_processes for i in (process, process + 1))
        writer.run(range(first, end))
    else:
        writer.run_queue()
    writer.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = cli.Flags(__doc__)
    flags.string("model", None, "model folder", required=True)
    flags.string("store", None, "store of the images, encoded by the model's tokenizer; local or gs://", required=True)
    flags.string("out", None, "folder for the features, local or gs://", required=True)
    flags.string("stream", "rgb", "stream of the images")
    flags.comma_list("pools", ("mean", "last"), f"some of {', '.join(POOLS)}: over an image's codes, or at each")
    flags.comma_list("layers", (), "layers, 0 of the embedding (default: all)")
    flags.integer("copies", 1, "copies of the image in a row; features are of the last", lower_bound=1)
    flags.boolean("histogram", False, "also write the counts of each image's codes")
    flags.enum("dtype", "float32", ("float32", "float16"), "of the arrays")
    flags.integer("batch_size", 64, "images per device and call", lower_bound=1)
    flags.integer("tensor", 1, "devices for tensor parallelism", lower_bound=1)
    flags.string("shard", "", "i/n: the share of process i, from 0, of n independent processes")
    return flags.run(_run, argv)


if __name__ == "__main__":
    cli.exit_process(main())
