from __future__ import annotations

import warnings

import pytest


@pytest.fixture(scope="session")
def load():
    """Import a package of the parity extra, or skip; what it warns of while loading is not ours to mend."""

    def load(name: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip(name, reason=f'no {name}: pip install "locaudit[parity]"')

    return load
