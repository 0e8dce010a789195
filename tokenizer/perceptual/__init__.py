"""Perceptual losses: differences of structure, or of a classifier's features with weights from a local file.

`config.loss.perceptual = {"kind": …}` selects one. A module in this folder is registered by being here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
