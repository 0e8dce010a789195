"""Progress of a run, for its supervisors: the step of the newest complete checkpoint, one number in the workdir."""

from etils import epath

from lvm.common import files

FILE = "progress"


def write(workdir: epath.PathLike, step: int) -> None:
    """Records that the checkpoint of `step` is complete."""
    files.write_atomically(epath.Path(workdir) / FILE, f"{step}\n".encode())


def read(workdir: epath.PathLike) -> int:
    """The step last recorded; 0 if there is none yet.

    Raises:
      OSError: the file can't be read.
    """
    try:
        text = (epath.Path(workdir) / FILE).read_text().strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdecimal() else 0  # after a power cut, anything
