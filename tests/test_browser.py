"""The report as a browser shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from locaudit.report import write_report
from locaudit.run.audit import run_audit
from locaudit.studies.paper import write_paper
from locaudit.studies.paper.run import run_paper
from runs import HashJudge, save_behaviour, save_model, small_config, study_config

JUDGES = {aspect: HashJudge(aspect) for aspect in ("truth", "info")}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    run_audit(small_config(home), home / "run", progress=False, judges=JUDGES)
    return write_report(home / "run")


@pytest.fixture(scope="module")
def study_path(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("study")
    save_model(home / "model")
    save_behaviour(home / "questions.jsonl")
    run_paper(study_config(home), home / "run", judges=JUDGES, progress=False)
    return write_paper(home / "run")


@pytest.mark.parametrize("width", [1200, 400])
def test_report_opens_without_complaints_and_fits(page_path, width):
    look(page_path, width, {"svg": 5, "article.card": 2})


@pytest.mark.parametrize("width", [1200, 400])
def test_study_opens_without_complaints_and_fits(study_path, width):
    look(study_path, width, {"svg": 13, "figure": 13, "table.claims tbody tr": 15})


def look(path: Path, width: int, counts: dict[str, int]) -> None:
    """Open a page in a browser: it has so many of each element, fits, and asks for nothing."""
    chromium = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    complaints, asked = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert page.locator("h1").inner_text().strip()
        for element, n in counts.items():
            assert page.locator(element).count() == n
            assert page.locator(element).first.is_visible()
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
