"""A source of codes whose scenes take a fixed time, and a process that encodes it with others.

python -m tests.tokenizer.slow_codes STORE NUM_SCENES NUM_SHARDS SECONDS    starts once STORE.go exists
"""

import dataclasses
import pathlib
import sys
import time

import numpy as np

from lvm.data.images.sources.base import CodeSource
from lvm.data.images.sources.scene import SceneCodes, SceneInfo
from lvm.data.store.shard_queue import ShardQueue
from lvm.data.streams.codecs import Image
from tokenizer.encoding import CodeCopier


@dataclasses.dataclass
class SlowCodes(CodeSource):
    """Scenes of one image each; `load_codes` sleeps."""

    num_scenes: int
    seconds: float

    name = "slow"
    streams = {"rgb": Image()}  # noqa: RUF012
    stream_sets = (("rgb",),)
    classes = ()
    skipped = ()
    num_codes, grid = 64, (2, 2)

    def __len__(self):
        return self.num_scenes

    def info(self, index):
        return SceneInfo(f"scene {index}", f"group {index}", "", 1, ("rgb",))

    def load_codes(self, index):
        time.sleep(self.seconds)
        return SceneCodes(self.info(index), np.full((1, 1, 4), index % 64, np.uint16))

    def describe(self):
        return {"kind": "slow", "scenes": self.num_scenes}


def copy(source, folder, num_shards):
    with ShardQueue(folder, num_shards, poll_s=0.05, ttl_s=5.0) as queue:
        CodeCopier(None, source, folder, num_shards).run_queue(queue)


def encode(folder, num_scenes, num_shards, seconds):
    copy(SlowCodes(num_scenes, seconds), folder, num_shards)


def main(folder, num_scenes, num_shards, seconds):
    pathlib.Path(f"{folder}.ready-{seconds}-{time.time_ns()}").touch()
    while not pathlib.Path(f"{folder}.go").exists():
        time.sleep(0.01)
    encode(folder, int(num_scenes), int(num_shards), float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
