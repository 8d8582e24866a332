"""The report as a browser shows it: what a reader sees first, what can be clicked, and that nothing in it acts."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from locaudit.config import merge_config
from locaudit.report import write_report
from locaudit.report.compare import write_comparison
from locaudit.report.repeats import write_repeats
from locaudit.run.audit import run_audit
from locaudit.run.repeats import run_repeats
from locaudit.store.run import load_run
from locaudit.studies.paper import write_paper
from locaudit.studies.paper.run import run_paper
from runs import HashJudge, save_behaviour, save_model, small_config, study_config

JUDGES = {aspect: HashJudge(aspect) for aspect in ("truth", "info")}
DESK, PHONE = (1280, 800), (390, 844)
EVIL = "<script>document.title='injected'</script><img src=x onerror=\"document.title='injected'\"> \u202e\x00end"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    """The report of a run with generated answers; a question and an answer hold a script."""
    home = tmp_path_factory.mktemp("inputs")
    config = small_config(home, controls=3, iti={"alphas": [2.0, 4.0]})
    run_audit(config, home / "run", progress=False, judges=JUDGES)
    with closing(sqlite3.connect(home / "run" / "trials.sqlite")) as database, database:
        claim = "SELECT fit FROM places WHERE arm = 'claim'"
        database.execute(f"UPDATE answers SET answer = ? WHERE fit IN ({claim})", (EVIL,))
        judged = "SELECT DISTINCT judge, question, ?, 0.25, '' FROM judgements"
        database.execute(f"INSERT OR REPLACE INTO judgements {judged}", (EVIL,))
        database.execute("UPDATE questions SET text = text || ? WHERE position = 0", (EVIL,))
    return write_report(home / "run")


@pytest.fixture(scope="module")
def compare_path(page_path, tmp_path_factory) -> Path:
    """The page of two audits side by side; the model of one is called a script."""
    run, other = page_path.parent, page_path.parent.parent / "other"
    config = merge_config(load_run(run).config, {"claim": "0.1,1.2", "seed": 3})
    run_audit(config, other, progress=False, judges=JUDGES)
    name_model(other)
    return write_comparison([run, other], tmp_path_factory.mktemp("compare"))[0]


@pytest.fixture(scope="module")
def repeats_path(tmp_path_factory) -> Path:
    """The page of two repeats, whose model is called a script."""
    home = tmp_path_factory.mktemp("repeats")
    config = small_config(home, controls=3, claim="0.1,1.2", iti={"alphas": [2.0, 4.0]})
    run_repeats(config, home / "runs", 2, progress=False, judges=JUDGES)
    for number in range(2):
        name_model(home / "runs" / f"repeat-{number}")
    return write_repeats(home / "runs")[0]


def name_model(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "trials.sqlite")) as database, database:
        database.execute("UPDATE manifest SET value = json_set(value, '$.model', ?)", (EVIL,))


@pytest.fixture(scope="module")
def study_path(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("study")
    save_model(home / "model")
    save_behaviour(home / "questions.jsonl")
    run_paper(study_config(home), home / "run", judges=JUDGES, progress=False)
    return write_paper(home / "run")


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=flags)
        yield found
        found.close()


@contextmanager
def opened(browser, path: Path, size=DESK, **options):
    """A page in the browser that must not complain, ask for anything, or be wider than the screen."""
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)), **options)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def tabs(page):
    """The ids of the page's sections, each opened in turn by its link and drawn."""
    for link in page.locator(".bar nav a").all():
        link.click()
        name = link.get_attribute("href").removeprefix("#")
        page.locator(f"#{name}").wait_for()  # the page hears of the click a moment later
        assert page.locator("main > section:visible").evaluate_all("x => x.map(y => y.id)") == [name]
        assert page.locator(".bar nav a[aria-current]").count() == 1 and link.get_attribute("aria-current") == "true"
        for chart in page.locator(f"#{name} .chart").all():
            chart.locator(".main-svg").first.wait_for()
        yield name


def sort_by(page, table, title: str) -> list[list[float]]:
    """The numbers of a column as the keyboard sorts them, up and down."""
    number = table.locator("thead th").all_inner_texts().index(title)
    head, found = table.locator("thead th").nth(number), []
    assert head.get_attribute("aria-sort") == "none"
    for order in ("ascending", "descending"):
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        cells = table.locator(f"tbody tr > :nth-child({number + 1})").all_inner_texts()
        found.append([float(x.split()[0].replace("−", "-")) for x in cells if x != "–"])  # without intervals
        assert found[-1] == sorted(found[-1], reverse=order == "descending")
    return found


def serious(page) -> list[str]:
    """What axe-core calls a serious or critical fault."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [f"{x['id']}: {[node['html'][:200] for node in x['nodes'][:3]]}" for x in found
            if x["impact"] in ("serious", "critical")]  # fmt: skip


@pytest.mark.parametrize("size", [DESK, PHONE])
@pytest.mark.parametrize("script", [True, False])
def test_the_first_screen_has_verdict_figure_and_numbers(browser, page_path, size, script):
    with opened(browser, page_path, size, java_script_enabled=script) as page:
        for element in ("h1", ".badges li >> nth=0", "svg.strip", ".numbers div >> nth=0"):
            box = page.locator(element).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], element
            assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] + 1, element
        badges = page.locator(".badges .badge")
        assert badges.count() >= 2 and set(badges.all_inner_texts()) <= {"yes", "no", "open", "-"}
        assert page.locator("svg.strip circle").count() == 3 and page.locator("svg.strip g.mark").count() == 3
        assert page.locator("main > section:visible").count() == (
            1 if script else page.locator("main > section").count()
        )
        if not script:
            assert page.locator("noscript p").is_visible() and page.locator("#questions").is_visible()


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light")])
def test_every_tab_opens_without_complaints_or_faults(browser, page_path, size, scheme):
    with opened(browser, page_path, size, color_scheme=scheme) as page:
        found = []
        for name in tabs(page):
            found.append(name)
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert serious(page) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], name
        assert found == ["verdict", "edits", "places", "training", "answers", "power", "how"]


def test_points_tell_their_trial_and_lead_to_its_answers(browser, page_path):
    with opened(browser, page_path) as page:
        page.locator("a[href='#edits']").click()
        chart = page.locator("#edits .chart").first
        chart.locator(".main-svg").first.wait_for()
        points = chart.locator(".scatterlayer .trace")
        name = points.last.evaluate("x => x.__data__[0].trace.name")
        box = points.last.locator(".points path").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        hover = chart.locator(".hoverlayer .hovertext")
        hover.wait_for()
        told = hover.text_content()
        assert name == "Optimal edit: claim" and "Claim" in told and "strength 0.2" in told and "KL" in told
        control = chart.locator(".scatterlayer .trace").nth(0).locator(".points path").last.bounding_box()
        page.mouse.click(control["x"] + control["width"] / 2, control["y"] + control["height"] / 2)
        page.wait_for_url("**#answers")
        assert page.locator("#answer-list .replies dt").count() > 0


def test_tables_sort_search_filter_and_download(browser, page_path, tmp_path):
    with opened(browser, page_path) as page:
        page.locator("a[href='#edits']").click()
        table = page.locator("[data-table=trials]")
        assert all(len(values) > 5 for values in sort_by(page, table, "KL"))
        n = table.locator("tbody tr").count()
        table.locator("input[type=search]").fill("control 1")
        assert 0 < table.locator("tbody tr").count() < n
        assert all("control 1" in x.lower() for x in table.locator("tbody th").all_inner_texts())
        table.locator("input[type=search]").fill("")
        table.locator("label", has_text="chosen").locator("select").select_option("")
        rows = list(csv.DictReader((page_path.parent / "trials.csv").read_text().splitlines()))
        assert table.locator("tbody tr").count() == len(rows) > n
        with page.expect_download() as waited:
            table.locator("button", has_text="CSV").click()
        waited.value.save_as(tmp_path / "trials.csv")
        found = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
        assert sorted(row["trial_id"] for row in found) == sorted(row["trial_id"] for row in rows)
        own = {(row["trial_id"], row["arm"], row["control"]): row for row in rows}
        for row in found:
            for key, text in own[row["trial_id"], row["arm"], row["control"]].items():
                assert row[key] == text or float(row[key]) == float(text), key
        table.locator("label", has_text="method").locator("select").select_option("iti")
        assert table.locator("tbody tr").count() == sum(row["method"] == "iti" for row in rows)
        page.locator("a[href='#how']").click()
        with page.expect_download() as waited:
            page.locator("#downloads button").first.click()
        waited.value.save_as(tmp_path / "verdict.json")
        assert json.loads((tmp_path / "verdict.json").read_text()) == json.loads(
            (page_path.parent / "verdict.json").read_text()
        )


def test_answers_are_searched_filtered_and_sorted_and_never_act(browser, page_path):
    with opened(browser, page_path) as page:
        page.locator("a[href='#answers']").click()
        items = page.locator("#answer-list li")
        n = items.count()
        assert n >= 3
        shown = EVIL.replace("\u202e", "\ufffd").replace("\x00", "\ufffd")
        assert items.first.locator("h3").inner_text().endswith(shown)
        assert shown in items.nth(1).inner_text()
        assert page.locator("#answer-list script, #answer-list img").count() == 0
        assert page.locator("script").count() == 3 and "injected" not in page.title()
        page.locator("#answer-list input[type=search]").fill("onerror")
        assert items.count() == n
        page.locator("#answer-list input[type=search]").fill("no such answer")
        assert items.count() == 0
        page.locator("#answer-list input[type=search]").fill("")
        for choice, mark in (("worse", ".mark-worse"), ("better", ".mark-better")):
            page.locator("#answer-list select").nth(0).select_option(choice)
            assert all(item.locator(mark).count() for item in items.all())
        page.locator("#answer-list select").nth(0).select_option("all")
        page.locator("#answer-list select").nth(1).select_option("worst")
        assert items.count() == n
        others = page.locator("#answer-list select").nth(2)
        for value in others.locator("option").evaluate_all("x => x.map(y => y.value)"):
            others.select_option(value)
            assert others.locator("option:checked").inner_text() in page.locator("#answer-list dt").all_inner_texts()


def test_the_theme_is_switched_and_everything_is_printed(browser, page_path):
    with opened(browser, page_path) as page:
        page.locator("a[href='#edits']").click()
        page.locator("#edits .main-svg").first.wait_for()
        ink = "getComputedStyle(document.querySelector('#edits .xtick text')).fill"
        look = f"[getComputedStyle(document.body).backgroundColor, {ink}]"
        light = page.evaluate(look)
        page.locator("#theme").click()
        page.wait_for_function(f"JSON.stringify({look}.slice(1)) != JSON.stringify({json.dumps(light[1:])})")
        dark = page.evaluate(look)
        assert light[0] != dark[0] and light[1] != dark[1]
        page.emulate_media(media="print")
        assert page.locator("main > section:visible").count() == page.locator("main > section").count()
        assert page.evaluate(look)[0] == light[0], "paper is white"
        assert not page.locator(".bar").is_visible()


PAGES = {
    "compare_path": ("compare", ".matrix tbody tr:nth-child(2) td b >> nth=0", ["lead anywhere"]),
    "repeats_path": ("verdict", ".badges li >> nth=0", ["repeat", "mean control"]),
}
"""Pages of several audits: their first section, what decides, and columns of their table."""


@pytest.mark.parametrize("size", [DESK, PHONE])
@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("name", PAGES)
def test_the_first_screen_of_several_audits_has_what_decides(browser, request, name, size, script):
    with opened(browser, request.getfixturevalue(name), size, java_script_enabled=script) as page:
        for element in ("h1", PAGES[name][1]):
            box = page.locator(element).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], element
            assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] + 1, element
        assert set(page.locator(".badge").all_inner_texts()) <= {"yes", "no", "open", "-"}
        sections = page.locator("main > section")
        assert page.locator("main > section:visible").count() == (1 if script else sections.count())


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light")])
@pytest.mark.parametrize("name", PAGES)
def test_pages_of_several_audits_open_without_complaints_or_faults(browser, request, name, size, scheme):
    first, _, columns = PAGES[name]
    with opened(browser, request.getfixturevalue(name), size, color_scheme=scheme) as page:
        found = list(tabs(page))
        for name in tabs(page):
            assert serious(page) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], name
        assert found[0] == first and len(found) == 2
        assert EVIL.split(" ")[0] in page.locator("main").text_content()
        assert page.locator("main script, main img").count() == 0 and page.title() != "injected"


@pytest.mark.parametrize("name", PAGES)
def test_the_table_of_several_audits_sorts_and_the_theme_is_switched(browser, request, name):
    with opened(browser, request.getfixturevalue(name)) as page:
        page.locator(".bar nav a").last.click()
        table = page.locator(".data-table")
        n = table.locator("tbody tr").count()
        for title in PAGES[name][2]:
            assert all(len(set(values)) > 1 and len(values) == n for values in sort_by(page, table, title))
        for label in table.locator("label").all():
            label.locator("select").select_option(index=1)
        assert 0 < table.locator("tbody tr").count() < n or not table.locator("label").count()
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_the_study_opens_without_complaints_and_fits(browser, study_path, size):
    with opened(browser, study_path, size) as page:
        assert page.locator("h1").inner_text().strip()
        assert page.locator("table.claims tbody tr").count() == 15
        assert page.locator("table.grid tbody tr").count() == 15
        assert page.locator("svg.strip").count() == 3 and page.locator(".chart").count() == 11
        for name in tabs(page):
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert serious(page) == [], name
