"""Scenes of a source that is too large to list or hold at once: listed part by part, decoded in worker processes."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Iterator

from lvm.data.images.augment import Augment
from lvm.data.images.decode_pool import Chunk, DecodePool
from lvm.data.images.decoding import Decoded, SceneDecoder
from lvm.data.images.sources import CodeSource, Failure, ImageSource
from lvm.data.images.sources.base import Part
from tokenizer.encoding_progress import EncodingProgress

_LISTED_AHEAD = 8  # parts of the source that threads list, and copy from object storage, before their turn


def list_parts(
    source: ImageSource | CodeSource, shards: Iterable[int], num_shards: int, progress: EncodingProgress
) -> Generator[tuple[int, Part]]:
    """Yields the listed parts of each shard, at least one."""
    pending: collections.deque[tuple[int, concurrent.futures.Future[Part]]] = collections.deque()
    threads = concurrent.futures.ThreadPoolExecutor(_LISTED_AHEAD, "list")

    def next_part() -> tuple[int, Part]:
        shard, future = pending.popleft()
        part = future.result()
        progress.add_part(len(part.scenes))
        return shard, part

    try:
        for shard in shards:
            for spec in source.plan(shard, num_shards):
                pending.append((shard, threads.submit(source.part, spec)))
                if len(pending) > _LISTED_AHEAD:
                    yield next_part()
        while pending:
            yield next_part()
    finally:
        threads.shutdown(cancel_futures=True)


def load_scenes(
    pool: DecodePool, source: ImageSource, augment: Augment, parts: Iterable[tuple[int, Part]],
    skip: Callable[[int, Iterable[Failure]], None],
) -> Iterator[tuple[Chunk, list[Decoded]]]:  # fmt: skip
    """Yields loaded chunks, whose `group` is the shard; releases each part once it is loaded.

    Args:
      source: opened with `augment.source_preprocess`.
      skip: called with each part's shard and what its listing found that is not used.
    """
    unreleased: collections.deque[tuple[Chunk, Part]] = collections.deque()  # with the last chunk of each

    def chunks() -> Iterator[Chunk]:
        decoder, streams = SceneDecoder(source.for_workers(), augment), set[str]()
        for shard, part in parts:
            skip(shard, part.skipped)
            if not source.is_listed:
                new = {stream for scene in part.scenes for stream in source.info(scene).streams} - streams
                if new:  # workers get the codecs of streams with the source, without its files
                    source.codecs(new)
                    decoder, streams = SceneDecoder(source.for_workers(), augment), streams | new
            for scenes in decoder.chunks(part.scenes):
                yield (chunk := Chunk(decoder, scenes, shard))
            unreleased.append((chunk, part))

    for chunk, decoded in pool.map(chunks()):
        yield chunk, decoded
        while unreleased and unreleased[0][0] is chunk:
            unreleased.popleft()[1].release()
