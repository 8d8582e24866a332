"""Claims from any source: `read_claim`, and a reader for each file format (`locaudit.registry.IMPORTERS`).

A format's name is the suffix of its files. A reader takes a path and the kind of units that do not say it, and returns
a `Location`, or `Found`, if the file has scores or tells sizes of its model.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.claims.directions import Directions, claim_rows
from locaudit.claims.kinds import Shape, find_kind
from locaudit.claims.spelling import ALIASES, kind_of_path, refuse_scores
from locaudit.claims.tables import (
    Found,
    is_number,
    read_array,
    read_named,
    read_table,
    read_value,
    split_kind,
    to_array,
)
from locaudit.errors import LocationError
from locaudit.location import Location
from locaudit.registry import IMPORTERS, KINDS

LARGEST = 64 * 2**20
"""Larger claim files are refused, in bytes."""
_DIRECTION = re.compile(r"(?P<file>[^\[\]]+)(?:\[(?P<rows>[^\[\]]+)\])?\s*@\s*(?P<layer>\d+)", re.ASCII)
"""Text of a claim of directions: ``FILE@LAYER`` or ``FILE[ROW,...]@LAYER``."""
_VECTORS = re.compile(r"\.(?:safetensors|npz|npy|pt)\s*(?:\[[^@]*\])?\s*@", re.IGNORECASE)
"""The beginning of such a text."""
_WIDTHS = (
    (
        1,
        re.compile(
            r"\.(?:(?:[qkv]|gate|up|gate_up|qkv)_proj|c_attn|c_fc|fc1|fc_in|query_key_value|dense_h_to_4h)\.lora_A\."
        ),
    ),
    (0, re.compile(r"\.(?:(?:o|down|out|c)_proj|fc2|fc_out|dense|dense_4h_to_h)\.lora_B\.")),
)
"""The axis of an adapter's tensors that is the width of the residual stream, by the tensor's name."""
_PICKLES = (".pkl", ".pickle", ".joblib", ".bin")


@dataclass(frozen=True)
class Claim:
    """A claimed location and where it came from."""

    location: Location
    source: str
    """The text or the path that was read; ``an object`` for other objects of Python."""
    format: str = ""
    """The file's format; empty if the source is no file."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the model that the source is about, by field of `Shape`, as far as the source tells."""
    vector: int | None = None
    """Length of the vectors that the source has for units whose name does not tell in which space they lie."""
    scored: Location | None = None
    """All units that the source gives scores of; None if it has no scores."""

    def check(self, shape: Shape) -> None:
        """Raise `LocationError` if the source is about a model of another shape, or about units outside this one."""
        wrong = {name: n for name, n in self.sizes.items() if getattr(shape, name) != n}
        if wrong:
            raise LocationError(
                got=f"{self.source}, about a model with " + ", ".join(f"{name} = {n}" for name, n in wrong.items()),
                expected=", ".join(f"{name} = {getattr(shape, name)}" for name in wrong) + " (this model's shape)",
                remedy="check which model it was made for, and the kind of its units (as in kv-group:scores.npy)",
            )
        for location in filter(None, (self.scored, self.location)):
            find_kind(location).check(location, shape)
        kind = find_kind(self.location)
        if self.vector is not None and (blocks := kind.blocks(shape)):
            lengths = sorted({blocks[1], blocks[0] * blocks[1], shape.width})
            if self.vector not in lengths:
                raise LocationError(
                    got=f"{self.source}, with vectors of {self.vector} numbers",
                    expected=f"{' or '.join(map(str, lengths))} numbers for {kind.plural} of this model",
                    remedy="check which model it was made for",
                )


def read_claim(
    source: Any,
    kind: str = "head",
    *,
    format: str = "auto",
    top_k: int | None = None,
    threshold: float | None = None,
) -> Claim:
    """Read a claim from text, from a file of any format of docs/claims.md, or from an object of Python.

    Directions are read from text such as ``"vectors.safetensors[refusal]@14"``; for arrays, see `read_directions`.

    Args:
        source: A text such as ``"14.3,15.7"``, ``"L14H3"`` or ``"mlp:10-14"``; the path of a file or of an adapter's
            folder, before which a text may have a kind, as in ``"neuron:scores.npy"``; or a `Location`, a list of
            units, a mapping, a data frame, or an array or tensor of scores (layers, units).
        kind: Kind of units that do not say it.
        format: Name of the file's format. ``auto``: the suffix decides.
        top_k: Take the units with the `top_k` highest scores.
        threshold: Take all units with at least this score.

    Returns:
        The claim. Its `location` has the `units`; `check` says whether the source is about a model.

    Raises:
        LocationError: The source cannot be read, can be read in two ways, or has scores and there is no rule.
        ConfigError: Unknown kind or format.

    Example:
        >>> read_claim("L14H3, L15H7").location.units
        ((14, 3), (15, 7))

    """
    if isinstance(source, Claim | Location):
        claim = source if isinstance(source, Claim) else Claim(source, "an object")
        Found(claim.location.units, claim.location.kind).choose(top_k, threshold) if claim.location.units else None
        return claim
    kind, text, named = ALIASES.get(kind, kind), "", False
    if isinstance(source, str | Path):
        kind, text, named = split_kind(str(source).strip(), kind)
        if (at := _DIRECTION.fullmatch(text)) and not _is_there(text):
            of = kind if named else "direction"
            claim = read_directions(
                Path(at["file"].strip()), int(at["layer"]), at["rows"] or "", kind=of, format=format
            )
            Found(claim.location.units, of).choose(top_k, threshold)  # which refuses a rule
            return claim
        if "@" in text and _VECTORS.search(text) and not _is_there(text):
            raise LocationError(
                got=f"{text}, in which no layer follows the file of a direction",
                expected="FILE@LAYER or FILE[ROW]@LAYER with one whole number, from 0",
                remedy="write, for example, vectors.npz[refusal]@14; a direction lies in one layer",
            )
        name = _format_of(Path(text)) if format == "auto" else format
        if name:
            with _named_in_errors(Path(text)):
                found = _read_file(Path(text), name, kind, named)
                return _claim(found, str(source), name, top_k, threshold)
        found = read_value(text, kind, named=named)
    else:
        found = read_value(source, kind)
    return _claim(found, str(source) if text else "an object", "", top_k, threshold)


def read_directions(
    source: Any, layer: int, rows: str | int | Sequence[object] = "", *, kind: str = "direction", format: str = "auto"
) -> Claim:
    """Read a claim of directions: the span of one or several vectors in one layer.

    Args:
        source: A vector (d,), vectors (rows, d), or a mapping from names to such arrays or tensors; or the path of a
            safetensors, npz, npy or pt file (weights only) with them.
        layer: The layer, from 0.
        rows: Which of the vectors are claimed: ``"refusal"``, ``"a,b"``, a number, a list of these, or ``"*"`` for
            all. Row i of an array is called ``i``, or ``NAME.i`` if there are several arrays. It can be left out if
            there is only one. The other rows of the array are a dictionary, from which controls can be drawn.
        kind: ``direction`` for the residual stream after the layer, ``heads-direction`` for the input of the layer's
            attention output projection.
        format: Name of the file's format. ``auto``: the suffix decides.

    Returns:
        The claim, for `audit` or `fit_optimal`.

    Raises:
        LocationError: The file cannot be read, a row is missing, zero or not finite, or the rows are of several arrays.
        ConfigError: Unknown kind.

    Example:
        >>> claim = read_directions({"refusal": refusing.mean(0) - other.mean(0)}, layer=14)

    """
    if not isinstance(KINDS[kind], Directions):
        raise LocationError(
            got=f"vectors as a claim of the kind {kind}",
            expected="the kind direction or heads-direction",
            remedy=f"write direction:FILE@{layer}, or leave the kind out",
        )
    if not isinstance(layer, Integral) or isinstance(layer, bool) or layer < 0:
        raise LocationError(
            got=f"the layer {layer!r} of a direction",
            expected="a whole number from 0",
            remedy="count layers from 0; the residual stream is that after the layer",
        )
    name, said = "", "the array"
    if isinstance(source, str | Path):
        path, said = Path(source), str(source)
        name = _format_of(path) if format == "auto" else format
        if name not in _ARRAYS or not _is_there(path):
            raise LocationError(
                got=f"{path}, which is no file of vectors" + ("" if _is_there(path) else " (it is not there)"),
                expected=f"a file of one of the formats {', '.join(_ARRAYS)}",
                remedy="check the path; a run folder keeps its vectors: locaudit audit RUN/config.yaml --out RUN",
            )
        source = _load(path, *_ARRAYS[name], np.inf)
        source = source if isinstance(source, Mapping) else {path.stem: source}
    arrays = source if isinstance(source, Mapping) else {"vector": source}
    rows = [rows] if isinstance(rows, int | np.integer) else rows
    if not isinstance(rows, str) and not (
        isinstance(rows, Sequence) and all(isinstance(x, str | Integral) for x in rows)
    ):
        raise LocationError(
            got=f"rows = {rows!r:.60}",
            expected="a name, a whole number, or a list of these",
            remedy='write, for example, rows="refusal" or rows=[117, 2048]',
        )
    with _named_in_errors(Path(said)):
        location = claim_rows({str(key): to_array(x) for key, x in arrays.items()}, int(layer), rows, kind, said)
    return Claim(location, said if name else "an object", name)


def _claim(found: Found, source: str, name: str, top_k: int | None, threshold: float | None) -> Claim:
    location = found.choose(top_k, threshold)
    scored = None if found.scores is None else Location(found.units, found.kind)
    return Claim(location, source, name, found.sizes, found.vector, scored)


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LocationError as error:
        where = "" if str(path) in error.got else f"{path}: "
        raise LocationError(got=where + error.got, expected=error.expected, remedy=error.remedy) from None


def _read_file(path: Path, name: str, kind: str, named: bool) -> Found:
    found = IMPORTERS[name](path, kind)
    if isinstance(found, Location):
        found = Found(found.units, found.kind)
    if named and found.kind != kind:
        raise LocationError(
            got=f"{path} with units of the kind {found.kind}",
            expected=f"units of the kind {kind}, as written before its name",
            remedy=f"write {found.kind}:{path}",
        )
    return found


def parse_location(claim: Any, kind: str = "head") -> Location:
    """The location of a claim (`read_claim`), from a source without scores."""
    return read_claim(claim, kind).location


def _is_there(path: str | Path) -> bool:
    with suppress(OSError, ValueError):  # a text can be too long for a path
        return Path(path).exists()
    return False


def _format_of(path: Path) -> str:
    """Name of the format of a file or an adapter's folder; empty for other text."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in IMPORTERS:
        return suffix
    is_pickle, is_file = path.suffix.lower() in _PICKLES, False
    with suppress(OSError, ValueError):  # a text can be too long for a path
        if (path / "adapter_config.json").is_file():
            return "peft"
        is_file = path.is_file()
    if is_file or is_pickle:
        what = "a pickle, which can run code when it is opened" if is_pickle else "a file of unknown format"
        raise LocationError(
            got=f"{path}, {what}",
            expected=f"a file of one of the formats {', '.join(IMPORTERS)}",
            remedy="save it as .npy or .safetensors" if is_pickle else "rename it, or name its format: --claim-format",
        )
    return ""


@IMPORTERS.register("json")
def read_json(path: Path, kind: str) -> Found:
    """Read JSON: text, a list, heads by layer, rows with names, or a circuit of EAP-IG or MIB (`read_value`)."""

    def load(file: Path) -> Any:
        return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)

    return read_value(_load(path, load, "JSON in which each object has a key once"), kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises `ValueError` for a repeated key, of which JSON keeps only the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("twice the key " + next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))
    return found


@IMPORTERS.register("csv")
def read_csv(path: Path, kind: str) -> Found:
    """Read CSV with a column ``layer`` and one of heads, neurons or key-value heads, or with one column of units.

    Other columns with text are ignored. One with numbers holds scores: such a file probably lists all heads, and rows
    with low scores would become part of the claim, so that a rule must choose.
    """
    cells = [[cell.strip() for cell in row] for row in csv.reader(_read(path).splitlines())]
    header, *lines = [row for row in cells if any(row)] or [[]]
    header = [name.lower() for name in header]
    got, remedy = "", ""
    if all(map(is_number, header)) and header:
        got, remedy = f"{path}, whose first line is {','.join(header)}", "write layer,head as its first line"
    for mark, name in {";": "semicolons", "\t": "tabs"}.items():
        if len(header) == 1 and mark in header[0]:
            got, remedy = f"{path} with {name} between its columns", "save it with commas between the columns"
    if got:
        raise LocationError(got=got, expected="the columns 'layer' and 'head' (or 'neuron')", remedy=remedy)
    keep = "keep only the rows that are the claim, and drop that column (pandas: to_csv(index=False))"
    return read_table(header, lines, str(path), kind, keep)


@IMPORTERS.register("txt")
def read_txt(path: Path, kind: str) -> Found:
    """Read a text file of units, in any spelling and on any number of lines.

    Lines such as ``1.17 0.91`` are refused: two units, or a unit and its score (`refuse_scores`).
    """
    text = _read(path)
    if re.search(r"[\s,;]-?0?\.[0-9]+[\s,;]*\Z", text, re.ASCII):  # one line is enough if the number is below 1
        refuse_scores(text, n_lines=1)
    return read_value(text, kind)


@IMPORTERS.register("npy")
def read_npy(path: Path, kind: str) -> Found:
    """Read an array of scores, a mask, or a list of units such as ITI's ``top_heads.npy``."""
    return read_array(_load(path, *_ARRAYS["npy"]), kind)


@IMPORTERS.register("npz")
def read_npz(path: Path, kind: str) -> Found:
    """Read an array as in ``npy``, or scores or vectors with names of units."""
    return read_named(_load(path, *_ARRAYS["npz"]), kind)


@IMPORTERS.register("safetensors")
def read_safetensors(path: Path, kind: str) -> Found:
    """Read tensors as in ``npz``."""
    return read_named(_load(path, *_ARRAYS["safetensors"]), kind)


@IMPORTERS.register("pt")
def read_pt(path: Path, kind: str) -> Found:
    """Read a tensor, tensors with names, or lists and mappings that ``torch.save`` wrote. No code is run."""
    value = _load(path, *_ARRAYS["pt"])
    if isinstance(value, Mapping) and value and all(hasattr(x, "detach") for x in value.values()):
        return read_named({str(name): to_array(tensor) for name, tensor in value.items()}, kind)
    return read_value(value, kind)


@IMPORTERS.register("gguf")
def read_gguf(path: Path, kind: str) -> Found:
    """Read a control vector of llama.cpp or repeng (`read_control_vector`): the residual streams that it changes."""
    vectors = read_control_vector(path)
    width = next(iter(vectors.values())).size
    return Found(tuple((layer,) for layer in vectors), "residual", sizes={"width": width})


def read_control_vector(path: Path) -> dict[int, NDArray]:
    """The vectors (d,) in a GGUF control vector, by layer: ``direction.N`` is added to the stream after layer N.

    Layers whose vector is zero are left out. Raises `LocationError`.
    """

    def load(file: Path) -> tuple[bool, dict[int, NDArray]]:
        from gguf import GGUFReader

        reader = GGUFReader(file)
        architecture = reader.get_field("general.architecture")
        parts = [(tensor.name.partition("."), np.array(tensor.data)) for tensor in reader.tensors]
        vectors = {int(layer): v for (name, _, layer), v in parts if name == "direction" and v.any()}
        return architecture is not None and architecture.contents() == "controlvector", vectors

    is_vector, vectors = _load(path, load, "a GGUF file")
    shapes = {v.shape if v.dtype.kind == "f" else "quantised" for v in vectors.values()}
    are_finite = all(np.isfinite(v).all() for v in vectors.values() if v.dtype.kind == "f")
    if not is_vector or len(shapes) != 1 or "quantised" in shapes or not are_finite:
        problem = "NaN, infinity, quantised numbers or several sizes" if vectors and is_vector else "no directions"
        raise LocationError(
            got=f"{path}, with {problem}",
            expected="a control vector: the architecture controlvector, and finite vectors direction.N of one size, "
            "some of them not zero",
            remedy="export it with repeng's export_gguf or llama.cpp's llama-cvector-generator",
        )
    return vectors


@IMPORTERS.register("peft")
def read_peft(path: Path, kind: str) -> Found:
    """Read the folder of a PEFT adapter: the claim is the attention or the MLP of the layers that it changes."""
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise LocationError(
            got=f"{path} without adapter_model.safetensors",
            expected="a PEFT adapter saved as safetensors",
            remedy="save it with save_pretrained",
        )
    shapes = _load(file, _shapes, "tensors, saved as safetensors", np.inf)
    parts = {name: kind_of_path(name) for name in shapes}
    layers: dict[str, set[int]] = {}
    for part in filter(None, parts.values()):
        layers.setdefault(part[0], set()).add(part[1])
    if len(layers) == 1:
        kind = next(iter(layers))
    if None in parts.values() or kind not in layers:
        odd = next((name for name, part in parts.items() if part is None), None)
        raise LocationError(
            got=f"{path}, an adapter that changes {odd or ' and '.join(sorted(layers))}",
            expected="an adapter of attention or MLPs, of which the claim is one",
            remedy="train it on these modules only"
            if odd
            else " or ".join(f"write {name}:{path}" for name in sorted(layers)),
        )
    widths = {shape[axis] for axis, names in _WIDTHS for name, shape in shapes.items() if names.search(name)}
    sizes = {"width": widths.pop()} if len(widths) == 1 else {}
    return Found(tuple((layer,) for layer in sorted(layers[kind])), kind, sizes=sizes)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file by name. Their content is not read."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _load_numpy(file: Path) -> Any:
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray) == (file.suffix.lower() == ".npz"):
        raise ValueError("the suffix does not fit the content")
    return loaded if isinstance(loaded, np.ndarray) else dict(loaded)


def _load_tensors(file: Path) -> Any:
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except TypeError:  # numpy has no bfloat16
        return {name: to_array(x) for name, x in import_module("safetensors.torch").load_file(file).items()}


def _load_torch(file: Path) -> Any:
    return import_module("torch").load(file, map_location="cpu", weights_only=True)


_ARRAYS: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "safetensors": (_load_tensors, "tensors, saved as safetensors"),
    "npz": (_load_numpy, "arrays of numbers, saved by numpy (not pickled objects)"),
    "npy": (_load_numpy, "an array of numbers, saved by numpy (not pickled objects)"),
    "pt": (_load_torch, "a tensor or a mapping of tensors, saved by torch.save"),
}
"""Formats of arrays: the function that reads a file, and what it expects, in words for an error."""


def _load(path: Path, load: Callable[[Path], Any], expected: str, largest: float = LARGEST) -> Any:
    """What `load` makes of a file that is there, not empty, and at most `largest` bytes long."""
    if not (_is_there(path) and path.is_file()):
        raise LocationError(got=f"{path}, which is not a file", expected="a claim file", remedy="check the path")
    size = path.stat().st_size
    if not 0 < size <= largest:
        raise LocationError(
            got=f"{path}, which is empty" if not size else f"{path} of {size / 2**20:.0f} MB",
            expected=f"a claim file of at most {LARGEST // 2**20} MB",
            remedy="keep only units and their scores (of a circuit, only the nodes)" if size else "check the path",
        )
    try:
        return load(path)
    except Exception as error:  # numpy, zip files, safetensors, gguf and torch share no base class
        said = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")  # torch writes in colours
        reason = " ".join(said.split())[:160]
        raise LocationError(
            got=f"{path}, which cannot be read ({reason})", expected=expected, remedy="save it again"
        ) from None


def _read(path: Path) -> str:
    return _load(path, lambda file: file.read_text(encoding="utf-8-sig"), "UTF-8 text")
