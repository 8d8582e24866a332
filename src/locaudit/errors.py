"""Errors that say what was got, what was expected and what to do about it."""

import importlib
from typing import Any


class LocauditError(ValueError):
    """Bad input: one line, ``got ...; expected ...; remedy``. The command line prints it and exits with code 2."""

    def __init__(self, *, got: str, expected: str, remedy: str):
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got {got}; expected {expected}; {remedy}")

    def __reduce__(self):
        return (_rebuild, (type(self), self.got, self.expected, self.remedy))


def _rebuild(cls: type[LocauditError], got: str, expected: str, remedy: str) -> LocauditError:
    return cls(got=got, expected=expected, remedy=remedy)


class ConfigError(LocauditError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(LocauditError):
    """A behaviour or text file that is not what it says, or questions that cannot be used."""


class LocationError(LocauditError):
    """A location that does not parse, is empty, too large or outside the model."""


class ModelError(LocauditError):
    """A model, tokenizer or architecture that cannot be audited."""


class RunFolderError(LocauditError):
    """A run folder of another configuration, in use, damaged or without room on disk."""


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
