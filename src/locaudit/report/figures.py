"""Charts as files for papers, drawn with Matplotlib: PDF, SVG or PNG, as wide as one or two columns.

`draw` understands what the charts of this package use: markers, lines, text and bars of error in traces of the kind
``scatter``, the cells of heat maps in those of the kind ``bar``, and lines and titles of the layout.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.report.charts import SYMBOLS, Chart, resolve
from locaudit.report.run_charts import null_charts, run_charts
from locaudit.report.style import INK, PAPER, require
from locaudit.report.tables import Tables
from locaudit.store.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["pdf", "svg", "png"]
WIDTHS = {"single": 3.3, "double": 6.9}
"""Widths of one and of two columns of a paper, in inches."""
DPI = 300
"""Dots per inch of PNG files."""
FILES: Mapping[str, str] = {
    "effect_kl": "drift_", "truth_info": "truth_info", "heads": "probes", "effects": "effects_", "tuning": "tuning_",
    "loss": "loss_",
}  # fmt: skip
"""Name of a file -> how the names of its charts (`run_charts`) begin."""
_MARKERS = {name: marker for marker, name in SYMBOLS.items()}
_DASHES = {"dot": ":", "dash": "--", "dashdot": "-."}
_POINT = 0.6
"""Points of a pixel. (A pixel is 0.75 points, but columns are narrower than screens.)"""
_LETTER = 4.1
"""Mean width of a letter, in points."""
_HIDDEN = 4_000
"""From so many cells on, a heat map is an image within PDF and SVG files."""


def run_figures(t: Tables) -> dict[str, list[Chart]]:
    """Name of a file -> its charts, for all of which the run has data."""
    charts = dict(run_charts(t))
    methods = {name: t.methods[name].title for name in t.verdict.methods}
    titles = {f"{kind}_{name}": title for kind in ("tuning", "loss", "effects") for name, title in methods.items()}
    for name, title in titles.items():
        if name in charts:
            charts[name]["layout"]["title"] = {"text": title}
    found = {"null": list(null_charts(t, list(methods)))}
    found |= {file: [c for name, c in charts.items() if name.startswith(start)] for file, start in FILES.items()}
    return {file: parts for file, parts in found.items() if parts}


def write_figures(
    figures: Mapping[str, Sequence[Chart]], folder: Path, form: Format = "pdf", width: float = WIDTHS["single"]
) -> list[Path]:
    """Draw each figure, `width` inches wide, into a file of its own; returns the files.

    Files of an earlier call are deleted if they no longer have data, for example because a judge was removed. Raises
    `RunFolderError` if there is nothing to draw, and `ConfigError` without the extra ``report``.
    """
    if not figures:
        raise RunFolderError(
            got="a run without anything to draw", expected="one scored edit or more", remedy="let the audit run on"
        )
    for name in {"null", *FILES} - {*figures}:
        (folder / f"{name}.{form}").unlink(missing_ok=True)
    return [save(draw(charts, width), folder, name, form) for name, charts in figures.items()]


def save(figure: Figure, folder: Path, name: str, form: Format) -> Path:
    """Write a figure into `folder`, and return the file. Equal figures give equal bytes."""
    without_dates: dict[str, dict[str, Any]] = {
        "png": {"dpi": DPI, "metadata": {"Software": None}},
        "svg": {"metadata": {"Date": None, "Creator": "locaudit"}},
        "pdf": {"metadata": {"CreationDate": None, "Creator": "locaudit"}},
    }
    file, path = io.BytesIO(), folder / f"{name}.{form}"
    with house_style():
        figure.savefig(file, format=form, **without_dates[form])
    figure.set_layout_engine("none")  # laid out once, not again for every format
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
    return path


@contextmanager
def house_style() -> Iterator[None]:
    """Set Matplotlib's style for drawing and saving. Leaving restores the caller's own style."""
    matplotlib = require("matplotlib")
    ours = matplotlib.rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **ours}):
        yield


def draw(charts: Sequence[Chart], width: float = WIDTHS["double"]) -> Figure:
    """Charts side by side if there is room for two columns, otherwise one below the other. Their legend is below.

    Raises `ValueError` for no charts.
    """
    if not charts:
        raise ValueError("got nothing to draw; expected at least one chart")
    shown = [resolve(chart) for chart in charts]
    columns = min(len(shown), round(width / WIDTHS["single"]))
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    heights = [max(_height(chart, width / columns) for chart in row) for row in rows]
    with house_style():
        figure = require("matplotlib.figure").Figure(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        keys: dict[str, Any] = {}
        for axis, chart, i in zip(grid.flat, shown, range(len(shown)), strict=False):
            keys |= _draw_chart(axis, chart, (width / columns, heights[i // columns]))
        for axis in grid.flat[len(shown) :]:
            axis.set_axis_off()
        if keys:
            _add_legend(figure, keys)
    return figure


def _height(chart: Chart, width: float) -> float:
    """Inches of a chart with its axis and title: as its layout says, as its cells need, or by its width."""
    layout = chart["layout"]
    if "height" in layout:
        return layout["height"] / 96 + 0.55
    if "barmode" not in layout:
        return min(0.75 * width, 3.2)
    across, up = (np.ptp(layout[axis]["range"]) for axis in ("xaxis", "yaxis"))
    return min(max(0.8 * width * up / across, 0.4 * width), 1.2 * width) + 0.5


def _add_legend(figure: Figure, keys: Mapping[str, Any]) -> None:
    """The legend, with as many columns as fit. The figure grows by its height."""
    width, height = figure.get_size_inches()
    columns = max(1, min(len(keys), int(width * 72 / (_LETTER * max(map(len, keys)) + 23))))
    rows = -(-len(keys) // columns)
    figure.set_size_inches(width, height + 0.15 * rows)
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=columns)


def _draw_chart(axis: Any, chart: Chart, size: tuple[float, float]) -> dict[str, Any]:
    """Draw a chart in so many inches; returns the entries of its legend."""
    layout, keys = chart["layout"], {}
    if "title" in layout:
        axis.set_title(_text(layout["title"]["text"]), loc="left")
    for shape in layout.get("shapes", ()):
        keys |= _draw_shape(axis, shape)
    for depth, trace in enumerate(chart["data"]):
        if "colorbar" in trace.get("marker", {}):
            _add_scale(axis, trace["marker"], size[1])
        else:
            keys |= (_draw_cells if trace["type"] == "bar" else _draw_scatter)(axis, trace, 3 + 0.01 * depth)
    for note in layout.get("annotations", ()):
        _write(axis, note)
    for name, inches in zip("xy", size, strict=True):
        _set_axis(axis, layout[f"{name}axis"], name, inches)
    symbols = [trace["marker"]["symbol"] for trace in chart["data"] if "symbol" in trace.get("marker", {})]
    if len({symbol.endswith("-open") for symbol in symbols}) == 2:
        keys["strength not chosen"] = _key(color=INK, marker="o", markerfacecolor="none", linestyle="")
    return keys


def _draw_shape(axis: Any, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A line from edge to edge."""
    look, is_level = _line_look(shape["line"]), shape["y0"] == shape["y1"]
    draw_line = axis.axhline if is_level else axis.axvline
    draw_line(shape["y0" if is_level else "x0"], zorder=1, **look)
    return {shape["name"]: _key(**look)} if "name" in shape else {}


def _draw_scatter(axis: Any, trace: Mapping[str, Any], depth: float) -> dict[str, Any]:
    """Markers, a line or texts."""
    mode, x, y = trace["mode"], trace["x"], trace["y"]
    marker = trace.get("marker", {})
    look: dict[str, Any] = {"linestyle": "", "alpha": trace.get("opacity", marker.get("opacity"))}
    if "lines" in mode:
        look |= _line_look(trace["line"])
    if "markers" in mode:
        look |= _marker_look(marker)
    axis.plot(x, y, zorder=depth, clip_on="cliponaxis" not in trace, **look)
    for name in ("x", "y"):
        if bar := trace.get(f"error_{name}"):
            ends = {f"{name}err": np.clip([bar["arrayminus"], bar["array"]], 0, None)}
            colour = look.get("markerfacecolor", look.get("color"))
            axis.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=1.2, zorder=depth - 0.5, clip_on=False, **ends)
    return {_text(trace["name"]): _key(**look)} if trace.get("name") and trace.get("showlegend", True) else {}


def _draw_cells(axis: Any, trace: Mapping[str, Any], depth: float) -> dict[str, Any]:
    """The cells of a heat map: unit squares."""
    corners = np.array([(-0.5, 0), (0.5, 0), (0.5, 1), (-0.5, 1)])
    cells = np.column_stack([trace["x"], trace["base"]])[:, None] + corners
    line = trace["marker"]["line"]
    look = {"edgecolors": line["color"], "linewidths": _POINT * line["width"] * 0.6}
    found = require("matplotlib.collections").PolyCollection(
        list(cells), facecolors=trace["marker"]["color"], zorder=depth, rasterized=len(cells) > _HIDDEN, **look
    )
    axis.add_collection(found)
    patch = require("matplotlib.patches").Patch(facecolor="none", edgecolor=line["color"], linewidth=1.2)
    return {_text(trace["name"]): patch} if trace.get("name") else {}


def _add_scale(axis: Any, marker: Mapping[str, Any], height: float) -> None:
    """The colours of a heat map with their values."""
    colours = require("matplotlib.colors")
    scale = colours.LinearSegmentedColormap.from_list("scale", [tuple(stop) for stop in marker["colorscale"]])
    mappable = require("matplotlib.cm").ScalarMappable(colours.Normalize(marker["cmin"], marker["cmax"]), scale)
    bar = axis.get_figure().colorbar(mappable, ax=axis, pad=0.02, fraction=0.05, shrink=0.9)
    bar.outline.set_visible(False)
    bar.set_label(_wrapped(marker["colorbar"]["title"]["text"], height))


def _set_axis(axis: Any, layout: Mapping[str, Any], name: str, inches: float) -> None:
    """Title, scale, limits and ticks of an axis."""
    own = getattr(axis, f"{name}axis")
    getattr(axis, f"set_{name}label")(_wrapped(layout["title"]["text"], inches) if "title" in layout else "")
    if layout.get("type") == "log":
        getattr(axis, f"set_{name}scale")("log")
    if "range" in layout:
        getattr(axis, f"set_{name}lim")(*layout["range"])
    if "tickvals" in layout:
        angle = layout.get("tickangle", 0)
        turned = {"rotation": -angle, "ha": "right", "rotation_mode": "anchor"} if angle else {}
        own.set_ticks(layout["tickvals"], [_text(text) for text in layout["ticktext"]], **turned)
        own.set_minor_locator(require("matplotlib.ticker").NullLocator())
    elif "dtick" in layout and layout.get("type") != "log":
        own.set_major_locator(require("matplotlib.ticker").MultipleLocator(layout["dtick"]))
    if layout.get("visible") is False:
        own.set_visible(False)
        axis.spines["left"].set_visible(False)
    elif layout.get("showgrid", True):
        axis.grid(axis=name, alpha=0.25, linewidth=0.5)


def _line_look(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "color": line["color"],
        "linewidth": _POINT * line["width"],
        "linestyle": _DASHES.get(line.get("dash", ""), "-"),
    }


def _marker_look(marker: Mapping[str, Any]) -> dict[str, Any]:
    symbol, edge = marker.get("symbol", "circle"), marker.get("line", {})
    colour = marker.get("color")
    look = {
        "marker": _MARKERS[symbol.removesuffix("-open")],
        "markersize": _POINT * float(np.max(marker.get("size", 6))),
    }
    if np.ndim(marker.get("size", 6)):
        look["markevery"] = [0]  # the other sizes are 0
    if colour is not None:
        look |= {
            "markerfacecolor": "none" if symbol.endswith("-open") else colour,
            "markeredgecolor": edge.get("color", colour),
        }
    return look | {"markeredgewidth": _POINT * edge.get("width", 0)}


def _text(text: str) -> str:
    """The text without Plotly's escapes, and with a dollar as such: Matplotlib reads mathematics between two."""
    return unescape(text).replace("$", r"\$")


def _wrapped(text: str, inches: float) -> str:
    """The title of an axis, in lines that fit into a chart of this size, which also holds the other axis."""
    width = max(12, int((inches - 0.5) * 72 / _LETTER))
    return "\n".join(fill(_text(line), width) for line in text.split("<br>"))


def _write(axis: Any, note: Mapping[str, Any]) -> None:
    """A text within a chart, outlined so that it stays readable over lines."""
    text, side = note["text"].removeprefix("<b>").removesuffix("</b>"), note["xanchor"]
    halo = require("matplotlib.patheffects").withStroke(linewidth=2.2, foreground=PAPER)
    axis.annotate(
        _text(text), (note["x"], note["y"]), xytext=(_POINT * note.get("xshift", 0), 0), textcoords="offset points",
        xycoords=axis.get_yaxis_transform() if "xref" in note else "data", ha=side, va="center", zorder=5,
        fontweight="bold" if text != note["text"] else "normal", path_effects=[halo], annotation_clip=False,
    )  # fmt: skip


def _key(**look: Any) -> Any:
    """An entry of a legend."""
    return require("matplotlib.lines").Line2D([], [], **look)
