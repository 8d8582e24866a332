"""Ask the Hugging Face hub once whether it has a repository, before a library retries and waits.

Address, proxy, token and download folder are configured as for huggingface_hub: ``HF_ENDPOINT``, ``HTTPS_PROXY``,
``HF_TOKEN``, ``HF_HOME``. With ``HF_HUB_OFFLINE`` the hub is not contacted. This file does not import torch.
"""

from __future__ import annotations

import threading
from pathlib import Path

SECONDS = 5
"""How many seconds to wait for the hub's answer."""


def ask(repository: str, file: str, *, revision: str | None = None, kind: str = "model") -> str | None:
    """None if the hub has the repository; otherwise the reason why it cannot be downloaded.

    A repository that lacks the file counts as found: the code that reads the file reports this.
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
        except Exception as error:  # of some HTTP library, depending on huggingface_hub's version
            problems[:] = [" ".join(str(error).split())[:300] or type(error).__name__]

    # The library's own timeout would not do: it counts for each of the hub's IP addresses, and not for the DNS lookup.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return problems[0] if problems else None


def downloaded(repository: str, file: str, *, revision: str | None = None) -> Path | None:
    """Path of a model's file that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, revision=revision)
    except HFValidationError:  # not a valid repository name
        return None
    return Path(found) if isinstance(found, str) else None
