"""Begins stores from many processes at once, each access to the folder delayed; prints the errors.

python -m tests.lvm.data.store.begin_storm FOLDER PROCESSES ROUNDS LATENCY_S
"""

import functools
import multiprocessing
import pathlib
import sys
import time

from etils import epath

from lvm.common import files
from lvm.data.store import writer

HEADER = {"tokenizer": {"hash": "a"}, "source": {"kind": "folder"}, "augment": 0}
NUM_SHARDS = 4


def delay(owner, name, seconds):
    function = getattr(owner, name)

    @functools.wraps(function)
    def delayed(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    setattr(owner, name, delayed)


def begin(folder, process, rounds, barrier, errors):
    for i in range(rounds):
        barrier.wait()
        try:
            writer.begin_store(folder / f"round-{i}", HEADER, NUM_SHARDS)
            # Shards follow at once: a process that begins late sees more than the header.
            (folder / f"round-{i}" / f"shard-{process:05d}").touch()
        except Exception as error:
            errors.put(f"round {i}: {type(error).__name__}: {error}")


def main(argv):
    folder, processes, rounds, latency_s = argv[0], int(argv[1]), int(argv[2]), float(argv[3])
    for owner, name in (
        (type(epath.Path(folder)), "exists"),
        (type(epath.Path(folder)), "iterdir"),
        (files, "read_json"),
        (files, "write_atomically"),
        (files, "create"),
    ):
        delay(owner, name, latency_s)
    context = multiprocessing.get_context("fork")
    barrier, errors = context.Barrier(processes), context.SimpleQueue()
    arguments = [(pathlib.Path(folder), i, rounds, barrier, errors) for i in range(processes)]
    workers = [context.Process(target=begin, args=of_worker) for of_worker in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    while not errors.empty():
        print(errors.get())
    print(f"{processes} processes, {rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
