"""The report as a browser shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from locaudit.report import write_report
from locaudit.runner import run_audit
from runs import HashJudge, small_config


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    judges = {aspect: HashJudge(aspect) for aspect in ("truth", "info")}
    run_audit(small_config(home), home / "run", progress=False, judges=judges)
    return write_report(home / "run")


@pytest.mark.parametrize("width", [1200, 400])
def test_report_opens_without_complaints_and_fits(page_path, width):
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
        page.goto(page_path.as_uri())
        assert page.locator("h1").inner_text().strip()
        assert page.locator("svg").count() == 5
        assert page.locator("article.card").count() == 2
        assert page.locator("article.said").first.is_visible()
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
