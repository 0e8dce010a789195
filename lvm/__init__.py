"""Large vision models: sequential modeling of pixels alone.

from lvm import LVM
model = LVM.load("runs/demo/lvm")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvm.inference.pretrained import LVM

__all__ = ["LVM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The leaves (vocabulary, errors) stay importable without loading a model's dependencies.
    if name == "LVM":
        from lvm.inference.pretrained import LVM

        return LVM
    raise AttributeError(f"module 'lvm' has no attribute {name!r}")
