"""What a user can put right: reported in one line, without a traceback."""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in the options, the data or the environment; the message says how to mend it."""


def import_extra(name: str) -> ModuleType:
    """Import a module of the optional extra ``fastcls[train]``.

    Raises:
        UserError: it cannot be imported; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is needed here and cannot be imported ({error}); "
            "install it with: pip install 'fastcls[train]'"
        ) from error
