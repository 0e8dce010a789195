"""Ranges of token ids: codes, special tokens, and ids reserved for further ranges."""

from __future__ import annotations

import dataclasses
import os

from etils import epath

from lvm.common import files
from lvm.common.config import from_config_dict
from lvm.common.errors import UserError

FILENAME = "vocabulary.json"
_NUM_RESERVED = 256  # ids after the codes: three special tokens and room for further ranges


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Layout of the token ids; with K codes, ours are codes [0, K), BOS K, EOS K+1, PAD K+2, size K+256.

    A special token that is None never occurs.
    """

    num_codes: int
    size: int
    bos: int | None
    eos: int | None
    pad: int | None

    def __post_init__(self) -> None:
        if not 0 < self.num_codes <= self.size:
            raise UserError(f"num_codes={self.num_codes} must lie in 1..{self.size} (size)")
        for name in ("bos", "eos", "pad"):
            token = getattr(self, name)
            if token is not None and not self.num_codes <= token < self.size:
                raise UserError(f"{name}={token} must lie in {self.num_codes}..{self.size - 1} or be null")

    @classmethod
    def for_codes(cls, num_codes: int) -> Vocabulary:
        """The vocabulary of models trained by this project on a codebook of `num_codes`."""
        return cls(num_codes, num_codes + _NUM_RESERVED, bos=num_codes, eos=num_codes + 1, pad=num_codes + 2)

    def save(self, folder: epath.PathLike) -> None:
        files.write_json(epath.Path(folder) / FILENAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: epath.PathLike) -> Vocabulary:
        """Reads a folder's vocabulary.json. Raises UserError if it is missing or invalid."""
        path = epath.Path(folder) / FILENAME
        if not path.exists():
            raise UserError(f"{path}: not found; it declares num_codes, size, bos, eos and pad of the model")
        return from_config_dict(cls, files.read_json(path), os.fspath(path))
