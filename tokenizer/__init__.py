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
    # Imported lazily: the package's modules can be imported one by one.
    if name == "Tokenizer":
        from tokenizer.pretrained import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
