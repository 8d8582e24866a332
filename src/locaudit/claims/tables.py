"""Claims in structured data: lists, mappings, rows with column names, arrays of scores and circuits."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.claims.spelling import ALIASES, read_text, refuse_scores
from locaudit.errors import LocationError
from locaudit.location import Location, Unit, order_of, spell_unit
from locaudit.registry import KINDS
from locaudit.text import plural

_LAYER = ("layer", "layer_idx", "layer_index", "layer_id")
UNIT_COLUMNS = {
    "head": ("head", "head_idx", "head_index", "head_id"),
    "neuron": ("neuron", "neuron_idx", "neuron_index", "neuron_id"),
    "kv-group": ("kv_head", "kv_group", "kv-group"),
}
"""Names of the column that counts a kind's units within a layer."""
_WHOLE_UNIT = ("unit", "component", "node", "name", "head", "neuron")
"""Columns whose cells name a whole unit, such as ``L14H3``, in a table without a column of layers."""
_SCORE = ("score", "importance", "effect", "value", "weight", "accuracy", "val_accuracy", "attribution")
_MASK = ("in_graph", "in_circuit", "in", "selected", "claimed", "chosen", "included", "mask")
"""Columns of True and False that say which rows are the claim."""
_LOW_IS_GOOD = {
    "p", "pval", "pvals", "pvalue", "pvalues", "pvaladj", "pvalueadj", "padj", "adjp", "q", "qval", "qvalue", "fdr",
    "rank", "ranking", "loss",
}  # fmt: skip
"""Names of columns, in letters only, of which low numbers are the best."""
_INDEX = ("", "index", "unnamed: 0", "id")
"""Names of a column that counts rows."""
_CHOICE = {"true", "false", "yes", "no"}
_SITES = {
    "attn": "heads", "attention": "heads", "self_attn": "heads", "head": "heads", "heads": "heads",
    "mlp": "neurons", "mlps": "neurons", "ffn": "neurons", "neuron": "neurons", "neurons": "neurons",
    "residual": "residual", "resid": "residual", "resid_post": "residual",
}  # fmt: skip
"""Words in a table that name a kind of place -> its site."""
_COMMA = re.compile(r"[+-]?[0-9]+(?:,[0-9]+)+%?", re.ASCII)
"""A number with a decimal comma, or with commas between thousands."""
_PER_LAYER = {"head": "n_heads", "neuron": "n_neurons", "kv-group": "n_kv_heads"}
"""The field of `locaudit.claims.kinds.Shape` that counts a kind's units per layer."""
_NODE = re.compile(r"a[0-9]+\.h[0-9]+|m[0-9]+", re.ASCII)
"""A head or an MLP among a circuit's nodes, as EAP-IG and MIB call them."""
_KEEP = "write each unit like this, without a score, and keep only those that are the claim"


@dataclass(frozen=True)
class Found:
    """What a source says: the units of a claim, or scores of units, from which a rule chooses the claim."""

    units: tuple[Unit, ...]
    kind: str
    scores: tuple[float, ...] | None = None
    """One score per unit; empty if it is unclear which numbers are the scores. None: all units are claimed."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the model that the source is about, by field of `Shape`, as far as the source tells."""
    vector: int | None = None
    """Length of its vectors, if the space in which they lie is not told (`locaudit.claims.importers.Claim`)."""
    got: str = ""
    """What the source holds, in words for an error."""
    remedy: str = _KEEP
    """How to write the claim without scores, in words for an error."""

    def choose(self, top_k: int | None, threshold: float | None) -> Location:
        """The units of the claim.

        With scores, these are the units with at least the score `threshold`; of these, at most the `top_k` with the
        highest scores (ties by layer, then unit). Raises `LocationError` for scores without a rule, a rule without
        scores, scores that are not finite, or a rule that chooses nothing.
        """
        rules = {"top_k": top_k, "threshold": threshold}
        if top_k is not None and (not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1):
            raise LocationError(
                got=f"top_k = {top_k!r}", expected="a whole number from 1", remedy="say how many units are the claim"
            )
        if threshold is not None and (not isinstance(threshold, Real) or isinstance(threshold, bool)):
            raise LocationError(
                got=f"threshold = {threshold!r}", expected="a number", remedy="say which score is enough"
            )
        given = " and ".join(f"{name} = {value}" for name, value in rules.items() if value is not None)
        if self.scores is None and given:
            raise LocationError(
                got=f"{given} for a claim without scores",
                expected="scores of units, from which to choose",
                remedy="leave the rule out",
            )
        every = Location(self.units, self.kind)  # which refuses repeated units
        if self.scores is None:
            return every
        if not given or len(self.scores) != len(self.units):
            by_rule = f"{self.remedy}; or choose by score, as with --claim-top-k 16 or --claim-threshold 0.7"
            raise LocationError(
                got=self.got,
                expected="one column of scores, with one for each unit"
                if given
                else "one row for each unit of the claim, without scores: every row counts as claimed",
                remedy="call the column score" if given else by_rule,
            )
        score = dict(zip(self.units, self.scores, strict=True))
        ranked = sorted(every.units, key=lambda unit: (-score[unit], order_of(unit)))
        bad = next((unit for unit in ranked if not math.isfinite(score[unit])), None)
        if bad is not None:
            raise LocationError(
                got=f"a score that is no finite number, for {spell_unit(bad)}",
                expected="a finite number for every unit",
                remedy="correct or delete it",
            )
        chosen = [unit for unit in ranked if threshold is None or score[unit] >= threshold]
        if not chosen or (threshold is None and len(chosen) < (top_k or 0)):
            raise LocationError(
                got=f"{given} for {plural(len(ranked), 'score')}, of which the highest is {score[ranked[0]]:.4g}",
                expected="a rule that chooses among them",
                remedy="lower it",
            )
        return Location(tuple(chosen[:top_k]), self.kind)


def read_value(value: Any, kind: str = "head", *, named: bool = False) -> Found:
    """Read a claim from text, a list, a mapping, rows, a data frame, or an array or tensor of scores.

    `kind` is that of units that do not say it, and `named` tells whether the user wrote it. Raises `LocationError`.
    """
    if isinstance(value, str):
        refuse_scores(value)
        return _read_string(value, kind, named)
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = value.to_dict("records")  # a data frame
    if isinstance(value, np.ma.MaskedArray) or (
        isinstance(value, tuple) and any(hasattr(x, "__array__") for x in value)
    ):
        raise LocationError(
            got="a masked array" if isinstance(value, np.ma.MaskedArray) else "a tuple of arrays",
            expected="an array of scores or a mask (layers, units), or pairs (units, 2)",
            remedy="write np.argwhere(mask), or np.stack(indices, axis=1) of indices as np.nonzero gives them",
        )
    if hasattr(value, "__array__"):
        return read_array(to_array(value), kind)
    if isinstance(value, Mapping):
        return _read_mapping(value, kind)
    if not isinstance(value, Iterable):
        raise LocationError(got=f"the claim {value!r}", expected="a list of units", remedy="write it as '14.3,15.7'")
    rows = [value] if isinstance(value, tuple) and list(map(type, value)) == [int, int] else list(value)
    whole = _is_whole(kind)
    if rows and all(isinstance(row, Mapping) for row in rows):
        return _read_rows(rows, kind)
    if rows and all(_all_floats(row) for row in rows) and len({len(row) for row in rows}) == 1:
        return read_array(np.array(rows), kind)
    if whole and _all_floats(rows):
        return read_array(np.array(rows), kind)
    if len(rows) == 2 and all(type(row) is int for row in rows) and not whole:
        raise LocationError(
            got=f"the list {rows}, which may be one {kind} (LAYER.UNIT) or two layers",
            expected=f"[{rows}] for one {kind}, or attention:{rows[0]},{rows[1]} for layers",
            remedy="write which of them it is; YAML reads 1:3 as 63, unless it is in quotes",
        )
    parts = [row if isinstance(row, str) else spell_unit(KINDS[kind].parse_unit(row)) for row in rows]
    return _read_string(",".join(parts), kind, named)


def read_array(array: NDArray, kind: str, what: str = "an array") -> Found:
    """Read scores (layers, units), or (layers,) if a unit is a whole layer; a mask of that shape; or pairs (units, 2).

    Floats are scores, booleans a mask, and integers the units themselves, as in ITI's list of heads.
    """
    what = f"{what} of shape {tuple(array.shape)} and type {array.dtype}"
    whole, is_list = _is_whole(kind), array.dtype.kind in "iu"
    if whole:
        fits = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
    elif is_list:
        fits = array.ndim == 2 and array.shape[1] == 2
    else:
        fits = array.ndim == 2 and array.dtype.kind in "fb" and kind in _PER_LAYER
    if not fits or not array.size:
        raise LocationError(
            got=f"{what}, for the kind {kind}",
            expected="scores (floats) or a mask (booleans) of shape "
            f"{'(layers,)' if whole else '(layers, units per layer)'}, or units (integers)",
            remedy="save it in this form; before a file's name, write the kind of other places, as in mlp:scores.npy; "
            "after that of a direction, its layer, as in vector.npy@14",
        )
    table = array.reshape(len(array), -1)
    places = [(layer,) if whole else (layer, unit) for layer, unit in np.ndindex(*table.shape)]
    if is_list:
        if len(table) > 1 and set(np.unique(table)) <= {0, 1}:
            raise LocationError(
                got=f"{what} with only 0 and 1, which may be a mask or a list of units",
                expected="booleans for a mask, or units",
                remedy="save a mask as booleans; write units as text, like 0.1,1.0",
            )
        return Found(tuple(tuple(row) for row in table.tolist()), kind)
    sizes = {"n_layers": len(table)} | ({} if whole else {_PER_LAYER[kind]: table.shape[1]})
    if table.dtype.kind == "b":
        return Found(tuple(unit for unit, is_in in zip(places, table.ravel(), strict=True) if is_in), kind, None, sizes)
    if table.shape[1] == 2 and not whole and np.all(table == np.floor(table)) and np.all(table >= 0):
        raise LocationError(
            got=f"{what} with whole numbers only, which may be scores of {len(table)} layers or a list of units",
            expected="integers for a list of (layer, unit)",
            remedy="save a list of units as integers: array.astype(int)",
        )
    return Found(tuple(places), kind, tuple(table.ravel().astype(float).tolist()), sizes, got=f"scores: {what}")


def read_named(arrays: Mapping[str, NDArray], kind: str) -> Found:
    """Read arrays with names, each of which is the score or a vector of the unit that its name spells.

    One array with another name is read by `read_array`. Raises `LocationError` for names that are no units, and for
    vectors with NaN or infinity.
    """
    try:
        found = read_value(list(arrays), kind)
    except LocationError:
        if len(arrays) != 1:
            raise
        ((name, array),) = arrays.items()
        return read_array(array, kind, f"{name}, an array")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise LocationError(
                got=f"{name}, which holds NaN, infinity or no numbers", expected="finite numbers", remedy="correct it"
            )
    if all(array.size == 1 for array in arrays.values()):
        scores = tuple(float(array.item()) for array in arrays.values())
        return replace(found, scores=scores, got=f"scores of {plural(len(scores), 'unit')}")
    widths = sorted({array.shape[-1] if array.ndim else 1 for array in arrays.values()})
    if len(widths) > 1:
        raise LocationError(
            got=f"vectors of the sizes {', '.join(map(str, widths))}",
            expected="one size",
            remedy="save the vectors of one model, and scores in another file",
        )
    if found.kind == "residual":
        return replace(found, sizes={"width": widths[0]})
    return replace(found, vector=widths[0])  # of the unit, of the site, or of what is added to the stream


def read_table(header: Sequence[str], lines: Sequence[Sequence[str]], source: str, kind: str, remedy: str) -> Found:
    """Read a table in which each row is a unit; `header` is in lower case. A column of other numbers holds scores."""
    return _Table(header, lines, source).read(kind, remedy)


@dataclass(frozen=True)
class _Table:
    """Rows of text with column names. Some columns name the unit; of the others, one may choose or score the rows."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    source: str
    """What the rows come from, in words for an error."""

    def read(self, kind: str, remedy: str) -> Found:
        found, used = self.units(kind)
        columns = {i: [line[i] for line in self.lines if i < len(line) and line[i]] for i in range(self.width)}
        columns = {i: cells for i, cells in columns.items() if i not in used and cells}
        self.refuse_other_sites(columns, found.kind)
        numbers = [i for i, cells in columns.items() if any(map(is_number, cells))]
        marked = [i for i in columns if i not in numbers and i < len(self.header) and self.header[i] in _MASK]
        choices = [i for i, cells in columns.items() if i in marked or _CHOICE & {cell.lower() for cell in cells}]
        if numbers or choices:
            self.refuse_lists_of_units(used, kind)
        self.refuse_commas(columns)
        if marked or (choices and not numbers):
            mask = [cell.lower() for cell in columns[choices[0]]]
            fits = choices == marked and len(choices) == 1 and not numbers and set(mask) <= {"true", "false"}
            if not fits or not len(mask) == len(self.lines) == len(found.units):
                raise self.two_choices(choices, numbers)
            return replace(found, units=tuple(u for u, cell in zip(found.units, mask, strict=True) if cell == "true"))
        if not numbers:
            return found
        got = f"{self.source} with numbers in the column {self.names(numbers)}"
        return replace(found, scores=self.scores(numbers, remedy), got=got, remedy=remedy)

    @property
    def width(self) -> int:
        """Number of cells in the longest row."""
        return max(map(len, self.lines), default=0)

    def names(self, columns: Iterable[int]) -> str:
        """The columns' names, in words for an error."""
        named = {i: name for i, name in enumerate(self.header) if name}
        return ", ".join(named.get(i, f"{i + 1}, without a name") for i in columns)

    def units(self, kind: str) -> tuple[Found, list[int]]:
        """The unit of each row, and the columns that name it."""
        layers = [i for i, name in enumerate(self.header) if name in _LAYER]
        inner = [
            (i, unit) for unit, names in UNIT_COLUMNS.items() for i, name in enumerate(self.header) if name in names
        ]
        whole = [i for i, name in enumerate(self.header) if name in _WHOLE_UNIT]
        if not layers and len(whole) == 1:
            return read_value(self.cells(whole[0]), kind), whole
        if len(layers) != 1 or not (len(inner) == 1 or (not inner and _is_whole(kind))):
            raise LocationError(
                got=f"{self.source} with the columns {list(self.header)}",
                expected="the columns 'layer' and 'head' (or 'neuron')",
                remedy="use these names in its first line",
            )
        kind, used = inner[0][1] if inner else kind, [*layers, *(i for i, _ in inner)]
        units = [tuple(line[i] for i in used if i < len(line)) for line in self.lines]
        bad = next((u for u in units if len(u) < len(used) or not all(x.isascii() and x.isdecimal() for x in u)), None)
        if bad is not None:
            raise LocationError(
                got=f"{self.source} with the line {', '.join(self.header[i] for i in used)} = {', '.join(bad)}",
                expected="two whole numbers, like 14,3",
                remedy="correct the line; write 14.0 as 14 (pandas: astype(int) before to_csv)",
            )
        return Found(tuple(KINDS[kind].parse_unit(unit) for unit in units), kind), used

    def cells(self, column: int) -> list[str]:
        return [line[column] if column < len(line) else "" for line in self.lines]

    def refuse_other_sites(self, columns: Mapping[int, Sequence[str]], kind: str) -> None:
        """Raise `LocationError` if a cell names another part of the layer than the kind's."""
        words = [cell for cells in columns.values() for cell in cells if cell.lower() in _SITES]
        if odd := next((word for word in words if _SITES[word.lower()] != KINDS[kind].site), None):
            raise LocationError(
                got=f"{self.source} with {odd!r} in a column, read as {KINDS[kind].plural}",
                expected="rows of one kind of place",
                remedy="keep the rows of one kind, drop that column, and write the kind before the name, as in "
                "mlp:x.csv",
            )

    def refuse_lists_of_units(self, used: Sequence[int], kind: str) -> None:
        """Raise `LocationError` if one cell names several units or none: then it is unclear what else a row says."""
        if len(used) != 1 or self.header[used[0]] in _LAYER:
            return
        several = next((x for x in self.cells(used[0]) if not x or len(read_value(x, kind).units) != 1), None)
        if several is not None:
            raise LocationError(
                got=f"{self.source} with {several!r} in the column {self.names(used)}",
                expected="one unit in each row, since other columns say something of it",
                remedy="write a row for each unit",
            )

    def refuse_commas(self, columns: Mapping[int, Sequence[str]]) -> None:
        """Raise `LocationError` for a column of numbers with a comma, which may be 1.5 or 1,500."""
        for i, cells in columns.items():
            if any(map(_COMMA.fullmatch, cells)) and all(map(_is_decimal, cells)):
                raise LocationError(
                    got=f"{self.source} with the number {cells[0]} in the column {self.names([i])}",
                    expected="numbers with a decimal point, and no commas between thousands",
                    remedy="write 1,5 as 1.5; or drop that column",
                )

    def two_choices(self, choices: Sequence[int], numbers: Sequence[int]) -> LocationError:
        """An error that says which columns may choose the rows of the claim."""
        scored = f", and numbers in the column {self.names(numbers)}" if numbers else ""
        return LocationError(
            got=f"{self.source} with a choice of rows in the column {self.names(choices)}{scored}",
            expected=f"at most one column of true and false, with a name such as {', '.join(_MASK[:4])}, no empty "
            "cell, and no scores beside it",
            remedy="keep only the rows that are the claim, and drop that column",
        )

    def scores(self, numbers: Sequence[int], remedy: str) -> tuple[float, ...]:
        """The score of each row; empty if it is unclear which of these columns holds it."""
        named = [i for i in numbers if i < len(self.header)]
        at = [i for i in named if self.header[i] in _SCORE] or named
        if len(named) < len(numbers) or len(at) != 1 or self.header[at[0]] in _INDEX:
            return ()  # more cells than names, several columns, or numbers that may count the rows
        if re.sub(r"[^a-z]", "", self.header[at[0]]) in _LOW_IS_GOOD:
            raise LocationError(
                got=f"{self.source} with the column {self.names(at)}, in which low numbers are the best",
                expected="scores, of which high ones are the best",
                remedy=f"{remedy}; or write a column score of which high is good, such as -log(p) or -rank",
            )
        return tuple(map(_number, self.cells(at[0])))


def is_number(cell: str) -> bool:
    """Whether a cell is a number, which may end in a percent sign."""
    try:
        float(cell.removesuffix("%"))
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_0 as 10


def _is_decimal(cell: str) -> bool:
    return is_number(cell) or _COMMA.fullmatch(cell) is not None


def to_array(value: Any) -> NDArray:
    """An array or a tensor of any device and type as a numpy array. Raises `LocationError` for a quantised tensor."""
    if hasattr(value, "detach"):  # a tensor of torch; numpy has no bfloat16
        value = value.detach().cpu()
        if value.is_quantized:
            raise LocationError(
                got="a quantised tensor", expected="a tensor of numbers", remedy="save tensor.dequantize()"
            )
        value = value if str(value.layout) == "torch.strided" else value.to_dense()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _read_string(text: str, kind: str, named: bool) -> Found:
    kind, text, named = split_kind(text.strip(), kind, named)
    if text[:1] in ("(", "[", "{"):
        try:
            tree = ast.parse(text, mode="eval")
            value = ast.literal_eval(tree)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            tree = value = None
        if tree and any(map(_has_key_twice, ast.walk(tree))):
            raise LocationError(
                got=f"{text[:80]} with a key twice", expected="each key once", remedy="put its units into one list"
            )
        if value is None or any(isinstance(x, float) for x in (value if isinstance(value, list | tuple) else [value])):
            value = text.strip("()[]{}")  # [14.10] is head 10, which as a number would be 14.1
        return read_value(value, kind, named=named)
    kind, units = read_text(text, kind, named=named)
    return Found(tuple(units), kind)


def _has_key_twice(node: ast.AST) -> bool:
    keys = [ast.dump(key) for key in node.keys if key] if isinstance(node, ast.Dict) else []
    return len(set(keys)) < len(keys)


def split_kind(text: str, kind: str = "head", named: bool = False) -> tuple[str, str, bool]:
    """Split a text such as ``mlp:8`` into (kind, rest, whether the kind is written); else `kind` and `named` stay.

    The same prefix before other units, as in ``mlp:8,mlp:9``, is dropped.
    """
    prefix, colon, rest = text.partition(":")
    name = prefix.strip().lower() if prefix.strip().lower() in {*KINDS, *ALIASES} else prefix
    name = ALIASES.get(name, name)
    if not colon or name not in KINDS:
        return kind, text, named
    if named and name != kind:
        raise LocationError(
            got=f"{text!r} after the kind {kind}", expected="one kind of place", remedy=f"write {text} alone"
        )
    return name, re.sub(rf"(?<=[\s,;]){re.escape(prefix)}:", "", rest).strip(), True


def _read_mapping(value: Mapping[Any, Any], kind: str) -> Found:
    if "nodes" in value or "edges" in value:
        return _read_circuit(value, kind)
    if "units" in value and set(value) <= {"units", "kind"}:
        given = str(value.get("kind", kind))
        return read_value(value["units"], ALIASES.get(given, given), named="kind" in value)
    layers = [str(key).strip() for key in value]
    if value and all(layer.isascii() and layer.isdecimal() for layer in layers):
        rows = list(zip(layers, value.values(), strict=True))
        if all(isinstance(row, list | tuple) and all(map(_is_whole_number, row)) for _, row in rows):
            return read_value([(layer, int(x)) for layer, row in rows for x in row], kind)
        by_layer = [(layer, dict(enumerate(row)) if isinstance(row, list | tuple) else row) for layer, row in rows]
        if all(isinstance(row, Mapping) and all(map(_is_score, row.values())) for _, row in by_layer):
            pairs = [((layer, str(unit)), score) for layer, row in by_layer for unit, score in row.items()]
            return _scored([unit for unit, _ in pairs], [score for _, score in pairs], kind)
    if value and all(map(_is_score, value.values())):
        for key in value:
            _refuse_number(key)
        return _scored(list(map(str, value)), list(value.values()), kind)
    raise LocationError(
        got=f"an object with the keys {sorted(map(str, value))[:10]}",
        expected='{"kind": "head", "units": [[14, 3], [15, 7]]}, or heads by layer: {"14": [3], "15": [7]}',
        remedy="use these keys and no others",
    )


def _scored(units: list[Any], scores: list[Any], kind: str) -> Found:
    found = read_value(units, kind)
    got = f"scores of {plural(len(scores), 'unit')}"
    return replace(found, scores=tuple(map(float, scores)), got=got)


def _read_rows(rows: Sequence[Any], kind: str) -> Found:
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    header = [name.strip().lower() for name in names]
    if not set(header) & {*_LAYER, *_WHOLE_UNIT}:
        KINDS[kind].parse_unit(rows[0])  # raises
    for key, cell in ((str(key).strip().lower(), cell) for row in rows for key, cell in row.items()):
        if key in _WHOLE_UNIT and not set(header) & {*_LAYER}:
            _refuse_number(cell)
        if isinstance(cell, list | tuple | Mapping):
            raise LocationError(
                got=f"rows with {key} = {cell!r:.60}",
                expected="one number or text in each cell",
                remedy='write a row for each unit, or heads by layer: {"14": [3], "15": [7]}',
            )
    texts = [{str(key): "" if cell is None else str(cell).strip() for key, cell in row.items()} for row in rows]
    lines = [[row.get(name, "") for name in names] for row in texts]
    return read_table(header, lines, f"rows such as the unit {dict(rows[0])}", kind, _KEEP)


def _refuse_number(unit: Any) -> None:
    """Raise `LocationError` for a unit that is a number with decimals."""
    if isinstance(unit, Real) and not isinstance(unit, Integral):
        raise LocationError(
            got=f"the number {unit} as a unit",
            expected="text, because the head 15.10 is not the number 15.1",
            remedy="put units in quotes (pandas: read_csv(..., dtype=str), or the columns layer and head)",
        )


def _read_circuit(value: Mapping[str, Any], kind: str) -> Found:
    """A circuit of EAP-IG or of the MIB benchmark: its nodes in the graph, or the ends of its edges in the graph.

    The claim has the heads, or the MLPs if `kind` is ``mlp``; a warning says how many nodes of the other kind are left
    out. Without any node or edge in the graph, the nodes' scores count, if they have some.
    """
    nodes, edges = (value.get(name) or {} for name in ("nodes", "edges"))
    if not isinstance(nodes, Mapping) or not isinstance(edges, Mapping):
        raise LocationError(
            got="a circuit whose nodes or edges are a list",
            expected='objects by name, as EAP-IG writes them: {"nodes": {"a14.h3": {"in_graph": true}}}',
            remedy="write the heads alone, as a list",
        )
    flags = {name: node if isinstance(node, bool) else _get(node, "in_graph") for name, node in nodes.items()}
    if text := next((flag for flag in flags.values() if not isinstance(flag, bool | int | None)), None):
        raise LocationError(
            got=f"a circuit with in_graph = {text!r}", expected="true or false", remedy="write it without quotes"
        )
    chosen: list[str] = [name for name, is_in in flags.items() if is_in]
    if not chosen:
        inside = [name for name, edge in edges.items() if edge is True or _get(edge, "in_graph")]
        chosen = list(dict.fromkeys(end.partition("<")[0] for name in inside for end in name.split("->")))
    scores = {name: _get(node, "score") for name, node in nodes.items()}
    listed = chosen or [name for name, score in scores.items() if _is_score(score)]
    mark = "m" if kind == "mlp" else "a"
    units = [name for name in listed if _NODE.fullmatch(name) and name.startswith(mark)]
    others = [name for name in listed if _NODE.fullmatch(name) and not name.startswith(mark)]
    if not units:
        raise LocationError(
            got=f"a circuit of {plural(len(nodes), 'node')} and {plural(len(edges), 'edge')}, none of which puts "
            f"{'an MLP' if mark == 'm' else 'a head'} in the graph",
            expected="nodes or edges with in_graph, as EAP-IG writes them, or nodes with scores",
            remedy="prune the graph before you save it; for its MLPs, write mlp: before the file's name",
        )
    if others and chosen:
        left, taken = ("heads", "MLPs") if mark == "m" else ("MLPs", "heads")
        warnings.warn(f"the claim is the circuit's {taken}; {len(others)} {left} are left out", UserWarning, 2)
    cfg = value.get("cfg") or {}
    names = ("n_layers",) if mark == "m" else ("n_layers", "n_heads")
    sizes = {name: cfg[name] for name in names if isinstance(cfg.get(name), int)}
    found = replace(read_value(units), sizes=sizes)
    return (
        found if chosen else replace(found, scores=tuple(scores[x] for x in units), got="scores of a circuit's nodes")
    )


def _get(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, Mapping) else None


def _is_whole(kind: str) -> bool:
    return getattr(KINDS[kind], "whole_layers", False)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_score(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _all_floats(row: Any) -> bool:
    return isinstance(row, list | tuple) and len(row) > 0 and all(isinstance(x, float) for x in row)


def _number(cell: str) -> float:
    if not is_number(cell):
        return math.nan
    return float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)
