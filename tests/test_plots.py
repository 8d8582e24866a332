"""Figures of a run in Python: the charts of the page, as Plotly figures."""

import sys

import pytest

from locaudit import read_result
from locaudit.errors import ConfigError
from locaudit.report.charts import resolve
from locaudit.report.run_charts import run_charts
from test_report import FULL, MANIFEST, make_run, replace


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return read_result(make_run(tmp_path_factory.mktemp("runs") / "run", FULL))


def test_figures_are_the_charts_of_the_page(result):
    pytest.importorskip("plotly")
    charts = dict(run_charts(result.tables))
    drawn = {
        "drift_mc2": result.plot.effect_kl(),
        "tuning_optimal": result.plot.tuning(),
        "probes": result.plot.heads(),
    }
    drawn["tuning_iti"] = result.plot.tuning("iti")
    for name, figure in drawn.items():
        traces = [trace.to_plotly_json() for trace in figure.data]
        assert len(traces) == len(charts[name]["data"])
        for trace, own in zip(traces, charts[name]["data"], strict=True):
            assert list(trace["x"]) == own["x"] and trace["marker" if "marker" in own else "line"]
        assert "--" not in figure.to_json().replace("<!--", ""), "colours are resolved"
    dots = [len(trace.x) for trace in result.plot.null().data if trace.customdata is not None]
    assert dots == [19] and result.plot.null("iti").layout.title.text == "ITI"


def test_colours_of_the_theme_are_those_of_paper():
    assert resolve({"color": ["--ink", "red"], "width": 1}) == {"color": ["#1d1e22", "red"], "width": 1}


def test_what_cannot_be_drawn_is_said(result, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="the method 'ablate'.*iti, optimal"):
        result.plot.null("ablate")
    bare = read_result(make_run(tmp_path / "run", FULL, manifest=replace(MANIFEST, probes=None)))
    with pytest.raises(ConfigError, match="without data for the figure probes; expected probes of every head"):
        bare.plot.heads()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=r"without the package plotly.*pip install 'locaudit\[notebook\]'"):
        result.plot.null()
