"""Entry point of containers: `start.py ARCHIVE ARGUMENTS…` fetches the code and runs `python ARGUMENTS…` in it.

Copied into the image by itself; imports nothing of the project.
"""

import io
import os
import sys
import tarfile
import tempfile

from etils import epath


def main(archive: str, arguments: list[str]) -> None:
    """Unpacks the archive into a temporary folder and replaces this process by `python` there."""
    folder = tempfile.mkdtemp(prefix="lvm-")
    with tarfile.open(fileobj=io.BytesIO(epath.Path(archive).read_bytes())) as file:
        file.extractall(folder, filter="data")
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
