"""A reader that keeps the language model's states on disk, so that a fit that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from locaudit.judges.base import Case
from locaudit.judges.reference.reader import Prompt, Reader
from locaudit.records import content_hash
from locaudit.store import write_atomically


class CachedReader:
    """A `Reader` behind a folder; `identity` names the language model and its precision."""

    def __init__(self, reader: Reader, folder: Path, identity: str):
        self._reader, self._folder, self._identity = reader, folder, identity
        folder.mkdir(parents=True, exist_ok=True)

    def prompt(self, case: Case) -> Prompt:
        """As the reader's, without keys and values."""
        path = self._path(case)
        if not path.is_file():
            prompt = self._reader.prompt(case)
            sides = torch.tensor([prompt.n_true, prompt.n_false])
            _write(path, {"states": prompt.states.half(), "segment": prompt.segment, "sides": sides})
        kept = load(path.read_bytes())
        return Prompt((), kept["states"].float(), kept["segment"], *kept["sides"].tolist())

    def read(
        self, case: Case, answers: Sequence[str], hidden: Sequence[frozenset[int]]
    ) -> Iterator[Float[Tensor, "layers tokens d"]]:
        """As the reader's."""
        path = self._path(case, list(answers), [sorted(numbers) for numbers in hidden])
        if not path.is_file():
            found = list(self._reader.read(case, answers, hidden))
            lengths = torch.tensor([states.shape[1] for states in found])
            _write(path, {"states": torch.cat(found, dim=1).half(), "lengths": lengths})
        kept = load(path.read_bytes())
        yield from kept["states"].float().split(kept["lengths"].tolist(), dim=1)

    def _path(self, case: Case, *rest: list) -> Path:
        key = [self._identity, self._reader.layers, case.question, case.true, case.false, *rest]
        return self._folder / f"{content_hash(key)}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
