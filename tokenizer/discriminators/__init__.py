"""Discriminators of images, each a kind of `Discriminator` in a module of its own.

`config.adversarial.discriminator = {"kind": …}` selects one. A module in this folder is registered by being here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
