"""Errors for bad input, which state what was got, what was expected and what to do about it."""

import importlib
import re
from typing import Any

_FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
_COMMAND = re.compile(r"\b(pip install|python|ray start|locaudit [a-z]+) ")


class LocauditError(ValueError):
    """Bad input, described in one line: ``got ...; expected ...; remedy``.

    In `got`, `expected` and `remedy`, settings are named by their flags, such as ``--out``. The command line prints
    this text (`line`) and exits with code 2. In Python, ``str(error)`` has the names of arguments and settings instead,
    such as `` `out` ``.
    """

    def __init__(self, *, got: str, expected: str, remedy: str):
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__("got {}; expected {}; {}".format(*map(_in_python, (got, expected, remedy))))

    @property
    def line(self) -> str:
        """The line for a user of the command line."""
        return f"got {self.got}; expected {self.expected}; {self.remedy}"

    def __reduce__(self):
        return (_rebuild, (type(self), self.got, self.expected, self.remedy))


def _in_python(text: str) -> str:
    """The text with names of arguments in place of flags. A text with a whole shell command is left as it is."""
    text = text.replace("the command's --help-all", "the docstring of its class")
    return text if _COMMAND.search(text) else _FLAG.sub(lambda flag: f"`{flag[1].replace('-', '_')}`", text)


def _rebuild(cls: type[LocauditError], got: str, expected: str, remedy: str) -> LocauditError:
    return cls(got=got, expected=expected, remedy=remedy)


class ConfigError(LocauditError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(LocauditError):
    """A data file is not in the expected format, or its questions cannot be used."""


class LocationError(LocauditError):
    """A location cannot be read, is empty, too large or outside the model, or an edit does not fit the model."""


class ModelError(LocauditError):
    """A model, tokenizer or architecture cannot be audited."""


class RunFolderError(LocauditError):
    """A run folder belongs to a run with other settings, is in use or is damaged, or the disk is full."""


def import_extra(module: str, extra: str) -> Any:
    """Import a module that an optional extra of locaudit installs. If it is missing, `ConfigError` names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            got=f"an environment without the package {module.partition('.')[0]}",
            expected=f"the packages of the extra {extra!r}",
            remedy=f"run: pip install 'locaudit[{extra}]'",
        ) from None
