"""Files of the Hugging Face hub: one question to the hub before any library there retries and waits. No torch here.

The hub's address, a proxy, a token and the folder of downloads are those of huggingface_hub: ``HF_ENDPOINT``,
``HTTPS_PROXY``, ``HF_TOKEN``, ``HF_HOME``. ``HF_HUB_OFFLINE`` asks nothing.
"""

from __future__ import annotations

import threading
from pathlib import Path

SECONDS = 5
"""How long the hub may take to answer."""


class HubError(Exception):
    """The hub does not give the file, and it was not downloaded before; the reason in a few words."""


def offline_copy(repository: str, file: str, *, revision: str | None = None, kind: str = "model") -> Path | None:
    """None where the hub has the repository; where it does not answer, the file as it was downloaded before.

    Raises `HubError` for neither. A repository without the file counts as there: who reads the file will say so.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    problem: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, repo_type=kind), timeout=SECONDS)
            problem.append(None)
        except Exception as error:  # that of an HTTP library; which one depends on huggingface_hub's version
            problem.append(error)

    # The library's own limit holds for each address of the hub in turn, and not for finding these addresses.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    error = problem[0] if problem else TimeoutError(f"no answer in {SECONDS} seconds")
    if error is None or isinstance(error, EntryNotFoundError):
        return None
    if copy := downloaded(repository, file, revision=revision, kind=kind):
        return copy
    text = " ".join(str(error).split())
    raise HubError(text if len(text) <= 300 else text[:297] + "...") from error


def downloaded(repository: str, file: str, *, revision: str | None = None, kind: str = "model") -> Path | None:
    """A file that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, revision=revision, repo_type=kind)
    except HFValidationError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None
