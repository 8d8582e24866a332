"""Errors for bad input, which state what was got, what was expected and what to do about it."""

import importlib
from typing import Any


class LocauditError(ValueError):
    """Bad input, described in one line: ``got ...; expected ...; remedy``.

    The command line prints this line and exits with code 2.
    """

    def __init__(self, *, got: str, expected: str, remedy: str):
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}; {remedy}")

    def __reduce__(self):
        return (_rebuild, (type(self), self.got, self.expected, self.remedy))


def _rebuild(cls: type[LocauditError], got: str, expected: str, remedy: str) -> LocauditError:
    return cls(got=got, expected=expected, remedy=remedy)


class ConfigError(LocauditError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(LocauditError):
    """A data file is not in the expected format, or its questions cannot be used."""


class LocationError(LocauditError):
    """A location cannot be read, is empty, too large or outside the model, or an edit does not fit it."""


class ModelError(LocauditError):
    """A model, tokenizer or architecture cannot be audited."""


class RunFolderError(LocauditError):
    """A run folder belongs to another configuration, is in use or damaged, or the disk is full."""


def import_extra(module: str, extra: str) -> Any:
    """Import a module that an optional extra of locaudit installs; `ConfigError` names the extra if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            got=f"an environment without the package {module.partition('.')[0]}",
            expected=f"the packages of the extra {extra!r}",
            remedy=f"run: pip install 'locaudit[{extra}]'",
        ) from None
