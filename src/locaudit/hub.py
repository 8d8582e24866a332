"""Files of the Hugging Face hub: one question to the hub before any library there retries and waits. No torch here.

The hub's address, a proxy, a token and the folder of downloads are those of huggingface_hub: ``HF_ENDPOINT``,
``HTTPS_PROXY``, ``HF_TOKEN``, ``HF_HOME``. ``HF_HUB_OFFLINE`` asks nothing.
"""

from __future__ import annotations

import threading
from pathlib import Path

SECONDS = 5
"""How long the hub may take to answer."""


def ask(repository: str, file: str, *, revision: str | None = None, kind: str = "model") -> str | None:
    """None where the hub has the repository; else why it does not give it, in a few words.

    A repository without the file counts as there: who reads the file will say so.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    problems = [f"no answer in {SECONDS} seconds"]

    def request() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, repo_type=kind), timeout=SECONDS)
            problems.clear()
        except EntryNotFoundError:
            problems.clear()
        except Exception as error:  # that of an HTTP library; which one depends on huggingface_hub's version
            problems[:] = [" ".join(str(error).split())[:300] or type(error).__name__]

    # The library's own limit holds for each address of the hub in turn, and not for finding these addresses.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return problems[0] if problems else None


def downloaded(repository: str, file: str, *, revision: str | None = None) -> Path | None:
    """A model's file that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, revision=revision)
    except HFValidationError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None
