"""The vectors of a run's claim and controls, if these are directions: ``directions.safetensors`` in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import NDArray

from locaudit.claims.directions import DICTIONARIES, VECTORS, Dictionary
from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.store.files import write_atomically

FILE = "directions.safetensors"


def save_directions(folder: Path, claim: Location, vectors: Mapping[str, NDArray]) -> None:
    """Write vectors by hash, and which rows of the claim's dictionary they are; nothing if there are no vectors."""
    from safetensors.numpy import save

    if not vectors:
        return
    rows = DICTIONARIES.get(str(claim))
    table = None if rows is None else {"size": rows.size, "claimed": rows.claimed, "known": rows.known}
    meta = json.dumps({"claim": str(claim), "dictionary": table}, sort_keys=True)
    write_atomically(folder / FILE, save(dict(vectors), {"locaudit": meta}))


def load_directions(folder: str | Path) -> None:
    """Make the vectors in a run folder known to this process, and the rows of its claim's dictionary.

    A dictionary that was read from the claim's own file stays, because it has all rows. Raises `RunFolderError` for a
    damaged file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads(file.metadata()["locaudit"])
            vectors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        table = meta["dictionary"]
        if table is not None:
            known = {int(number): unit for number, unit in table["known"].items()}
            read = DICTIONARIES.setdefault(meta["claim"], Dictionary(table["size"], tuple(table["claimed"]), known))
            read.known.update(known)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            got=f"{path}, which cannot be read ({error})",
            expected="the vectors of the run's claim and controls, as the run wrote them",
            remedy="restore the file, or choose another --out and give the claim's file again",
        ) from None
    for key, vector in vectors.items():
        VECTORS.setdefault(key, vector)
