"""The named ranges of token ids: codes, then the specials, then room for more."""

from __future__ import annotations

import dataclasses

from etils import epath

from lvm.common import files
from lvm.common.errors import UserError

FILENAME = "vocabulary.json"
_ROOM = 256  # ids after the codes: three specials, and space for further ranges


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """With K codes: codes [0, K), BOS K, EOS K+1, PAD K+2, size K+256. A special that is None is never put."""

    num_codes: int
    size: int
    bos: int | None
    eos: int | None
    pad: int | None

    def __post_init__(self) -> None:
        if not 0 < self.num_codes <= self.size:
            raise UserError(f"vocabulary: num_codes is {self.num_codes}, must lie in 1..{self.size} (size)")
        for name in ("bos", "eos", "pad"):
            token = getattr(self, name)
            if token is not None and not self.num_codes <= token < self.size:
                raise UserError(
                    f"vocabulary: {name} is {token}, must lie in {self.num_codes}..{self.size - 1} or be null"
                )

    @classmethod
    def for_codes(cls, num_codes: int) -> Vocabulary:
        """The vocabulary of a model trained here on a codebook of `num_codes`."""
        return cls(num_codes, num_codes + _ROOM, bos=num_codes, eos=num_codes + 1, pad=num_codes + 2)

    def save(self, folder: epath.PathLike) -> None:
        files.write_json(epath.Path(folder) / FILENAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: epath.PathLike) -> Vocabulary:
        path = epath.Path(folder) / FILENAME
        if not path.exists():
            raise UserError(f"{path}: not found; it declares num_codes, size, bos, eos and pad of the model")
        try:
            return cls(**files.read_json(path))
        except (TypeError, UserError) as error:
            raise UserError(f"{path}: {error}; wanted num_codes, size, bos, eos, pad") from error
