"""What a user can put right: reported in one line, without a traceback."""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in the options, the data or the environment; the message says how to mend it."""


def import_extra(name: str, source: str = "'fastcls[train]'") -> ModuleType:
    """Import a module that not every user needs, by default one of the extra ``fastcls[train]``.

    Args:
        name: of the module.
        source: what pip installs it with.

    Raises:
        UserError: it cannot be imported; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is needed here and cannot be imported ({error}); "
            f"install it with: pip install {source}"
        ) from error
