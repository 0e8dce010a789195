"""The image ↔ code model.

from tokenizer import Tokenizer
tokenizer = Tokenizer.load("runs/demo/tokenizer")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.pretrained import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    # Modules of the package stay importable one by one without loading all of it.
    if name == "Tokenizer":
        from tokenizer.pretrained import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
