"""Keep other libraries' progress bars and advice out of what our calls print."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.std import tqdm
from transformers.utils import logging as transformers_logging

_LIBRARIES = r"(transformers|torch|tokenizers|huggingface_hub|accelerate|safetensors|gguf|peft|datasets|numpy)\b"
"""Regular expression for the names of modules whose warnings are hidden."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide other libraries' progress bars, warnings and log messages below errors, inside a context or a function.

    What the user asked for is kept: progress bars that are already open, a verbosity of transformers other than its
    default, and any warning filter that names or catches a library's warnings (such as ``-W error``).
    """
    show, before, verbosity = tqdm.__init__, vars(tqdm)["__init__"], transformers_logging.get_verbosity()

    def hide(self: Any, *args: Any, **keywords: Any) -> None:
        show(self, *args, **{**keywords, "disable": True})

    tqdm.__init__ = hide  # type: ignore[method-assign]
    if verbosity == logging.WARNING:
        transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_LIBRARIES, append=True)
            yield
    finally:
        tqdm.__init__ = before  # type: ignore[method-assign]
        transformers_logging.set_verbosity(verbosity)
