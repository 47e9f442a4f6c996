"""What a user can put right: reported in one line, without a traceback."""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in the options, the data or the environment; the message says how to mend it."""


def first_line(error: Exception) -> str:
    """What an error says, without the rest of a long one."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
