"""One module per recipe: its data, its model and a ``Config`` with the reference's settings.

A recipe ``some-name`` is the module ``some_name.py`` here, which defines

- ``Config``: a subclass of :class:`fastcls.config.Config` whose defaults are the recipe;
- ``load_data(settings, root)``: a :class:`fastcls.data.Data` out of the folder of the data sets;
- ``build_model(settings, classes)``: a module that maps a batch of images to logits.
"""

import importlib
import pkgutil
from types import ModuleType

from fastcls.errors import UserError


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The module of recipe ``name``.

    Raises:
        UserError: there is no such recipe; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"unknown recipe {name!r}; the recipes are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
