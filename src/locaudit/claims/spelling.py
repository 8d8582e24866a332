"""Units of a claim in the spellings that people and tools use, such as ``14.3``, ``L14H3`` or ``mlp:10-14``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from locaudit.claims.kinds import BUILT_IN, Blocks, whole_layers
from locaudit.errors import LocationError
from locaudit.location import Unit
from locaudit.registry import KINDS

ALIASES = {"heads": "head", "neurons": "neuron", "kv": "kv-group", "kv-groups": "kv-group", "mlps": "mlp"}
"""Other names of kinds, which are accepted too."""
LONGEST_RANGE = 100_000
"""Ranges with more units than this are refused."""

_RANGE = r"[0-9]+(?:-[0-9]+)?"
_BETWEEN = r"[\s.,:]*"
_PATH = r"(?P<model>(?:[a-z_]\w*\.)*)(?:layers?|blocks?|h)\.(?P<layer>[0-9]+)(?P<path>(?:\.[a-z_]\w*)*)"
_INDEX = r"(?:\[(?:\s*:\s*,\s*:\s*,)?\s*(?P<index>[0-9]+)\s*\]|\s+(?P<word>head|neuron)\s*(?P<unit>[0-9]+))?"
_FORMS = [
    (kind, re.compile(rf"{form}(?=[\s,;]|$)", re.ASCII | re.IGNORECASE))
    for kind, form in (
        ("", rf"(?P<layer>{_RANGE})\s*[.:]\s*(?P<unit>{_RANGE}|\*)"),
        ("head", rf"(?:layer\s*|l|a)(?P<layer>[0-9]+){_BETWEEN}(?:head\s*|h)(?P<unit>[0-9]+)"),
        ("neuron", rf"(?:layer\s*|l|m)(?P<layer>[0-9]+){_BETWEEN}(?:neuron\s*|n)(?P<unit>[0-9]+)"),
        ("mlp", rf"(?:mlp\s*|m)(?P<layer>{_RANGE})"),
        ("", rf"(?:(?P<word>layers?)\s*|l)?(?P<layer>{_RANGE})"),
        ("path", _PATH + _INDEX),
    )
]
"""(the kind that the form names, or empty; the form of a unit, up to a separator or the end)."""
_HEADS = (
    "attn", "self_attn", "attention", "self_attention", "hook_z", "hook_result", "hook_pattern", "hook_attn_scores",
    "hook_q", "hook_rot_q", "hook_q_input", "w_q", "w_o",
)  # fmt: skip
"""Last parts of paths whose index counts attention heads, not key-value heads or coordinates."""
_NEURONS = ("hook_post", "act_fn", "act", "down_proj")
"""Last parts of paths whose index counts neurons of an MLP."""
_PAIR = re.compile(r"[^\s,;]*[0-9][^\s,;]*[\s,;]+-?[0-9]*\.?[0-9]+(?:e-?[0-9]+)?", re.ASCII | re.IGNORECASE)
"""A unit in any spelling without spaces, and a number."""
_NORM = re.compile(r"norm|\bln", re.IGNORECASE)
"""In the path of a norm, such as ``post_attention_layernorm``, which is part of neither attention nor MLP."""
_KEYS = re.compile(r"[._][kv](?:[._]|$)")
"""In the path of keys or values, whose heads are key-value heads."""
_TOWER = re.compile(r"vision|visual|image|audio", re.IGNORECASE)
"""In the path of a model that reads images or sound for the language model."""


def read_text(text: str, kind: str = "head", *, named: bool = False) -> tuple[str, list[Unit]]:
    """Read units separated by commas, semicolons or spaces, in their order, and their kind.

    `kind` is that of units whose spelling does not say it; `named` tells whether the user wrote it. ``14.*`` is all of
    a layer, and ``10-14`` a range. Raises `LocationError` for other text, for units of different kinds, and for text
    that can be read in two ways.
    """
    if not isinstance(KINDS[kind], Blocks):
        return kind, [KINDS[kind].parse_unit(part) for part in text.split(",") if part.strip()]
    found: dict[str, list[Unit]] = {}
    for name, units in _scan(text, kind, named):
        found.setdefault(name, []).extend(units)
    if named and set(found) - {kind, whole_layers(KINDS[kind].site)} or len(found) > 1:
        raise LocationError(
            got=f"units of the kinds {', '.join(dict.fromkeys([*([kind] if named else []), *found]))} in one claim",
            expected="one kind of place",
            remedy="make each kind a claim of its own; whole layers are written as attention:14 or mlp:14",
        )
    return next(iter(found.items()), (kind, []))


def refuse_scores(text: str, n_lines: int = 2) -> None:
    """Raise `LocationError` for `n_lines` lines or more of a unit and a number, such as ``14.3 0.91`` or ``L14H3 2.9``.

    The number may be a unit, too, or a score.
    """
    lines = [line.strip(" \t,;") for line in text.splitlines() if line.strip()]
    if len(lines) >= n_lines and all(map(_PAIR.fullmatch, lines)):
        raise LocationError(
            got=f"lines such as {lines[0]}, which may be two units or a unit and its score",
            expected="one unit per line, or scores in a CSV file",
            remedy="write units in one column; for scores, write unit,score as the first line of a .csv file",
        )


def kind_of_path(text: str) -> tuple[str, int] | None:
    """Kind and layer of the module whose path occurs in a text, such as a tensor's name; None if there is none."""
    found = re.search(_PATH, text)
    kind = found and not _TOWER.search(text[: found.start("layer")]) and _part_of_layer(found["path"], indexed=False)
    return (kind, int(found["layer"])) if found and kind else None


def _scan(text: str, kind: str, named: bool) -> Iterator[tuple[str, list[Unit]]]:
    at = 0
    while gap := re.compile(r"[\s,;]*(?=[^\s,;])").match(text, at):
        at = gap.end()
        name, found = next(((name, m) for name, form in _FORMS if (m := form.match(text, at))), ("", None))
        part = found[0] if found else re.compile(r"[^,;]+").match(text, at)[0].strip()  # type: ignore[index]
        at += len(part)
        yield _read(part, name, found.groupdict() if found else {}, kind, named)


def _read(part: str, form: str, found: dict[str, str | None], kind: str, named: bool) -> tuple[str, list[Unit]]:
    """Kind and units of one part of a text. `found` has what its form names: layer, unit, index, word, path."""
    path, unit = (found.get("path") or "").lower(), found.get("unit") or found.get("index")
    if form == "path":
        word = (found.get("word") or "").lower()
        form = _part_of_layer(path, indexed=unit is not None and not word)
        if word:
            fits = not path or (form == whole_layers(KINDS[word].site) and not _KEYS.search(path))
            form = word if fits else ""
        if not form or _TOWER.search(found["model"] or ""):
            raise LocationError(
                got=f"{part}, which does not name a kind of place",
                expected="a head (blocks.14.attn.hook_z[3]), a neuron (blocks.14.mlp.hook_post[117]), or a layer's "
                "attention, mlp or resid_post",
                remedy="write the unit as 14.3, neuron:14.117, attention:14, mlp:14 or residual:14",
            )
    name = form or kind
    if not found or (KINDS[name].whole_layers and unit not in (None, "*")):
        return name, [KINDS[name].parse_unit(part)]  # which says what is wrong
    layers = _range(str(found["layer"]), part)
    if KINDS[name].whole_layers:
        return name, [(layer,) for layer in layers]
    if unit == "*" or (unit is None and found.get("word") and named):
        return whole_layers(KINDS[name].site), [(layer,) for layer in layers]
    if unit is None:
        ways = ", ".join(f"{whole}:{found['layer']}" for whole, blocks in BUILT_IN.items() if blocks.whole_layers)
        raise LocationError(
            got=f"{part!r}, which may be a part of a {name}'s name (LAYER.UNIT) or a whole layer",
            expected=f"LAYER.UNIT with whole numbers, like 14.3, or one of {ways}",
            remedy="write which of them it is",
        )
    blocks = _range(unit, part)
    if len(layers) * len(blocks) > LONGEST_RANGE:
        raise LocationError(
            got=f"{part!r}, which is {len(layers) * len(blocks)} units",
            expected=f"at most {LONGEST_RANGE}",
            remedy="write fewer, or whole layers as attention:10-14 or mlp:10-14",
        )
    return name, [(layer, x) for layer in layers for x in blocks]


def _part_of_layer(path: str, *, indexed: bool) -> str:
    """The kind that a path below a layer, such as ``.attn.hook_z``, stands for; empty if there is none."""
    last = path.rpartition(".")[2]
    if _NORM.search(path):
        return ""
    if "attn" in path or "attention" in path:
        return "attention" if not indexed else "head" if last in _HEADS else ""
    if "mlp" in path or "feed_forward" in path or "ffn" in path or last in ("fc1", "fc2"):  # OPT has them in the layer
        return "mlp" if not indexed else "neuron" if last in _NEURONS else ""
    return "residual" if last in ("", "hook_resid_post") and not indexed else ""


def _range(text: str, part: str) -> range:
    first, _, last = text.partition("-")
    start, end = int(first), int(last or first)
    if not start <= end < start + LONGEST_RANGE:
        raise LocationError(
            got=f"the range {text} in {part!r}",
            expected=f"FIRST-LAST, with at most {LONGEST_RANGE} numbers",
            remedy="write the smaller number first",
        )
    return range(start, end + 1)
