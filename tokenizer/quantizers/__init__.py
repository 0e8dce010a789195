"""Quantizers: objects between encoder and decoder, each a kind of `Quantizer` in a module of its own.

`config.model.quantizer = {"kind": …}` selects one. A module in this folder is registered by being here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
