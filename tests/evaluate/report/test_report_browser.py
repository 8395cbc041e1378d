"""The report in headless Chromium: tables, figures, the way from a point to its texts, access.

Needs the `selenium` package, and Chromium with its driver on the PATH (Debian: chromium and
chromium-driver); skips where they are missing.
"""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.figures import gallery
from selfcorrect.evaluate.report.page import write_comparison, write_report
from selfcorrect.evaluate.report.vega import vega_script
from selfcorrect.evaluate.statistics.formatting import with_interval
from tests.support.recorded_run import HOSTILE, SMALL, Size, record_run
from tests.support.small_runs import call

pytestmark = pytest.mark.browser

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no Chromium with chromedriver here: apt install chromium chromium-driver",
                allow_module_level=True)  # fmt: skip


BAD_ITEM = "Age/0</script><img src=x onerror=\"document.title='taken'\">\u202e"
MEGABYTE = "\u202e\x07</script><script>document.title='taken'</script>" * 20_000


def rewrite(path, change):
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


def rename(rows):
    for row in rows:
        if row["item"] == "Age/0":
            row["item"] = BAD_ITEM
            if row["samples"]:
                row["samples"] = [HOSTILE, MEGABYTE]


@pytest.fixture(scope="module", autouse=True)
def main_figure_alone():
    """Draw the figure that the page shows, and not those that lie beside it."""
    draw = gallery._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "_draw", lambda plans, *where: draw(plans[:1], *where))
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = record_run(tmp_path_factory.mktemp("browser") / "run # 1", SMALL)
    for path in run.glob("*/seed-*/ppo/checkpoint-*/evaluation/bbq.*.parquet"):
        rewrite(path, rename)
    log = [
        {"ppo_step": n, "objective/score": n / 40, "objective/kl": n / 100} for n in range(1, 41)
    ]
    (run / "small/seed-0/ppo/stage.json").write_text(json.dumps({"log": log}))
    return write_report(run, num_resamples=50)


def start(javascript=True):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1200,900")
    if not javascript:
        refused = {"profile.managed_default_content_settings.javascript": 2}
        options.add_experimental_option("prefs", refused)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.fixture(scope="module")
def chromium():
    driver = start()
    yield driver
    driver.quit()


@pytest.fixture
def opened(chromium, page):
    """The page, freshly loaded; whatever the test did, the console must have stayed silent."""
    chromium.get(page.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.title == "run # 1: self-correction report"  # no text has become a script


def part(driver, name):
    return driver.find_element(By.CSS_SELECTOR, f"#browser [data-part={name}]")


def column(driver, table, place):
    cells = driver.find_elements(By.CSS_SELECTOR, f"{table} tbody tr td:nth-child({place})")
    return [cell.text for cell in cells if cell.is_displayed()]


BBQ = 'table[aria-labelledby="results-bbq"]'


def unfold(driver, name):
    """Open a folded section, and wait until its script has run."""
    driver.execute_script("document.getElementById(arguments[0]).open = true", name)
    wait(driver, lambda: driver.find_element(By.CSS_SELECTOR, f"#{name} summary").is_displayed())


def wait(driver, reached):
    WebDriverWait(driver, 900, poll_frequency=0.05).until(lambda _: reached())


def unfold_texts(driver):
    unfold(driver, "texts")
    wait(driver, lambda: part(driver, "table").text)


def choose(driver, name, text):
    """Choose an option, and wait until the page shows what it stands for."""
    Select(part(driver, name)).select_by_visible_text(text)
    driver.execute_async_script("setTimeout(arguments[0], 100)")


def test_no_network_access(opened, page):
    loaded = opened.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    assert page.stat().st_size < 20_000_000


def test_sorting_by_keyboard(opened):
    unfold(opened, "experiment-bbq")
    wait(opened, lambda: opened.find_elements(By.CSS_SELECTOR, f"{BBQ} th button"))
    header = opened.find_element(By.XPATH, "//table[@aria-labelledby='results-bbq']//th[4]")
    assert header.text == "Step" and header.get_attribute("aria-sort") is None
    button = header.find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(opened, BBQ, 4) == ["0"] * 6 + ["2"] * 6 + ["10"] * 6  # as numbers
    button.send_keys(Keys.SPACE)
    assert header.get_attribute("aria-sort") == "descending"
    assert column(opened, BBQ, 4) == ["10"] * 6 + ["2"] * 6 + ["0"] * 6
    said = [one.text for one in opened.find_elements(By.CSS_SELECTOR, "[role=status]")]
    assert "Sorted by Step, descending" in said
    assert len(opened.find_elements(By.CSS_SELECTOR, f"{BBQ} [aria-sort]")) == 1


def test_filtering_rows(opened):
    unfold(opened, "experiment-bbq")
    label = "#experiment-bbq input[aria-label='Filter rows of Every checkpoint and condition']"
    wait(opened, lambda: opened.find_elements(By.CSS_SELECTOR, label))
    field = opened.find_element(By.CSS_SELECTOR, label)
    field.send_keys("SMALL q+if+cot")
    assert column(opened, BBQ, 1) == ["small"] * 3
    assert column(opened, BBQ, 5) == ["Q+IF+CoT"] * 3
    assert "3 of 18 rows" in [
        e.text for e in opened.find_elements(By.CSS_SELECTOR, "[role=status]")
    ]
    field.clear()
    field.send_keys("nothing like this")
    assert column(opened, BBQ, 1) == []


def test_transcript_of_an_item(opened):
    unfold_texts(opened)
    choose(opened, "experiment", "Winogender")
    choose(opened, "job", "nano")
    part(opened, "search").send_keys("occupation-7")
    items = [option.text for option in Select(part(opened, "item")).options]
    assert len(items) == 1 and items[0].endswith("occupations: occupation-7.txt")
    assert part(opened, "status").text.startswith("1 item of 10 shown.")
    table = part(opened, "table")
    assert "occupation-7.txt" in table.find_element(By.TAG_NAME, "caption").text
    heads = [h.text for h in table.find_elements(By.CSS_SELECTOR, "thead th")]
    assert heads == ["Step", "Q", "Q+IF", "Q+IF+CoT", "Match stats"]
    assert steps_shown(opened) == ["Asked", "0", "10"]  # the two that are compared
    part(opened, "all").click()
    assert steps_shown(opened) == ["Asked", "0", "2", "10"]
    rows = part(opened, "table").find_elements(By.CSS_SELECTOR, "tbody tr")
    cot = rows[-1].find_elements(By.TAG_NAME, "td")[2].text
    assert "Model's text: Both could be true. So it goes." in cot
    assert "cut off at the token limit" in cot  # the recorded run cuts every seventh
    assert "his 0." in cot and "chosen" in cot and "probability on the options 0.900" in cot
    part(opened, "columns").find_elements(By.TAG_NAME, "input")[1].click()
    heads = [h.text for h in part(opened, "table").find_elements(By.CSS_SELECTOR, "thead th")]
    assert heads == ["Step", "Q", "Q+IF+CoT", "Match stats"]
    part(opened, "search").send_keys(" no such word")
    assert Select(part(opened, "item")).options == []
    assert part(opened, "table").text == ""


def steps_shown(driver):
    return [h.text for h in part(driver, "table").find_elements(By.CSS_SELECTOR, "tbody th")]


def test_search_finds_what_the_model_wrote(opened):
    unfold_texts(opened)
    part(opened, "search").send_keys("So it goes. So it goes. So it goes.")
    number = len(Select(part(opened, "item")).options)
    assert 0 < number < 48


def test_answers_that_changed(opened, page):
    """The status counts what the files hold: chosen options that differ between the two steps."""
    unfold_texts(opened)
    choose(opened, "condition", "Q+IF")
    choose(opened, "job", "small")
    part(opened, "changed").click()
    rows = {}
    for step in (0, 10):
        folder = page.parent / f"small/seed-0/ppo/checkpoint-{step}/evaluation"
        for row in pq.read_table(folder / "bbq.Q+IF.parquet").to_pylist():
            rows.setdefault(row["item"], []).append(row)
    raise_chance, flips = {}, {}
    for item, (first, last) in rows.items():
        best = [max(range(3), key=row["logprobs"].__getitem__) for row in (first, last)]
        target = first["stereotyped"] if first["context"] == "ambiguous" else None
        rise = (
            0 if target is None else last["probabilities"][target] - first["probabilities"][target]
        )
        raise_chance[item], flips[item] = rise, best[0] != best[1]
    trend = sum(raise_chance.values())
    against = [item for item in rows if flips[item] and raise_chance[item] * trend < 0]
    assert 0 < sum(flips.values()) < len(rows) and trend < 0
    said = part(opened, "status").text
    assert f"{sum(flips.values())} answers changed, {len(against)} against the trend." in said
    shown = [option.text for option in Select(part(opened, "item")).options]
    assert len(shown) == sum(flips.values())
    marked = [text.startswith("against the trend") for text in shown]
    assert marked == sorted(marked, reverse=True) and sum(marked) == len(against)


def test_previous_and_next_item(opened):
    unfold_texts(opened)
    first = part(opened, "table").find_element(By.TAG_NAME, "caption").text
    number = len(Select(part(opened, "item")).options)
    part(opened, "next").send_keys(Keys.ENTER)
    assert part(opened, "status").text.startswith(f"Item 2 of {number}: ")
    assert part(opened, "table").find_element(By.TAG_NAME, "caption").text != first
    part(opened, "previous").send_keys(Keys.ENTER)
    assert part(opened, "table").find_element(By.TAG_NAME, "caption").text == first
    assert part(opened, "status").get_attribute("role") == "status"


def test_hostile_texts_are_escaped(opened):
    unfold_texts(opened)
    part(opened, "search").send_keys("onerror")
    part(opened, "all").click()
    table = part(opened, "table")
    assert "Age/0</script><img src=x onerror=" in table.text
    assert "<script>document.title='taken'</script>⟨U+202E⟩txet desrever⟨U+0007⟩" in table.text
    assert f"cut here; {len(MEGABYTE):,} characters in all" in table.text
    assert "\u202e" not in table.text and "\x07" not in table.text
    assert table.find_elements(By.CSS_SELECTOR, "img, script") == []
    scripts = opened.find_elements(By.CSS_SELECTOR, "script:not([type])")
    assert len(scripts) == (2 if vega_script() else 1)


def test_permalinks(opened, page):
    unfold_texts(opened)
    choose(opened, "experiment", "Winogender")
    choose(opened, "job", "nano")
    choose(opened, "from", "2")
    Select(part(opened, "item")).select_by_index(3)
    caption = part(opened, "table").find_element(By.TAG_NAME, "caption").text
    link = part(opened, "link").get_attribute("href")
    opened.get("about:blank")
    opened.get(link)
    wait(opened, lambda: part(opened, "table").text)
    wait(opened, lambda: steps_shown(opened) == ["Asked", "2", "10"])
    assert part(opened, "table").find_element(By.TAG_NAME, "caption").text == caption
    chosen = [
        Select(part(opened, name)).first_selected_option.text for name in ("experiment", "job")
    ]
    assert chosen == ["Winogender", "nano"]
    opened.get(f"{page.as_uri()}#texts?experiment=none&item=<img src=x>&to=7")  # of another run
    wait(opened, lambda: part(opened, "table").text)
    assert opened.find_elements(By.CSS_SELECTOR, "#browser img") == []


# --- figures -------------------------------------------------------------------------------------


@pytest.fixture
def drawn(opened):
    """The page with its main figure drawn."""
    if vega_script() is None:
        pytest.skip("no vl-convert-python here: the figures that answer clicks are NOT tested")
    wait(opened, lambda: opened.find_elements(By.CSS_SELECTOR, POINTS))
    return opened


POINTS = "#main-figure .mark-symbol.role-mark path"


def figure(driver, name):
    return driver.find_element(By.CSS_SELECTOR, f"#main-figure [data-part={name}]")


def redrawn(driver, act):
    """Act, wait for another figure, and return its alternative text."""
    before = figure(driver, "chart").get_attribute("aria-label")
    act()
    wait(
        driver,
        lambda: figure(driver, "chart").get_attribute("aria-label") not in ("Main figure", before),
    )
    return figure(driver, "chart").get_attribute("aria-label")


def test_a_point_tells_its_numbers_and_opens_its_texts(drawn, page):
    statistics = json.loads((page.parent / "statistics.json").read_text())
    assert (
        len(drawn.find_elements(By.CSS_SELECTOR, POINTS)) == 2 * 3 * 3
    )  # sizes, conditions, steps
    redrawn(drawn, lambda: Select(figure(drawn, "model")).select_by_index(2))
    for box in figure(drawn, "conditions").find_elements(By.TAG_NAME, "input")[1:]:
        redrawn(drawn, box.click)
    points = drawn.find_elements(By.CSS_SELECTOR, POINTS)
    assert len(points) == 3  # of Q
    ActionChains(drawn).move_to_element(points[-1]).perform()
    wait(drawn, lambda: drawn.find_element(By.ID, "tip").is_displayed())
    tip = drawn.find_element(By.ID, "tip").text.split("\n")
    condition, size = tip[0].split(", ")
    step = int(re.search(r"step (\d+)", tip[2])[1])
    (cell,) = [
        c for c in statistics["cells"]
        if c["experiment"] == "bbq" and f"{c['model']} (" in size
        and (c["condition"], c["step"]) == (condition, step)
    ]  # fmt: skip
    row = cell["metrics"]["overall"]["bias_ambiguous"]
    assert row["low"] is not None
    assert tip[1] == f"{with_interval(row)}, 95 % interval over items"
    assert tip[3] == f"{cell['num_items']} items in {cell['num_clusters']} clusters"
    ActionChains(drawn).click().perform()
    wait(drawn, lambda: part(drawn, "status").text)
    assert Select(part(drawn, "condition")).first_selected_option.text == condition
    assert Select(part(drawn, "job")).first_selected_option.text in size
    assert Select(part(drawn, "to")).first_selected_option.text == str(step)
    assert part(drawn, "changed").is_selected()
    assert drawn.execute_script("return document.activeElement.dataset.part") == "item"


def test_choices_of_the_figure(drawn):
    law = redrawn(drawn, lambda: Select(figure(drawn, "experiment")).select_by_index(2))
    assert law.startswith("Law school admission, Difference against RLHF steps")
    assert "small (509k), Q+IF " in law and "nano (8.2k), Q " in law
    root = redrawn(drawn, lambda: Select(figure(drawn, "axis")).select_by_visible_text("√KL"))
    assert "against √KL" in root
    one = redrawn(drawn, lambda: Select(figure(drawn, "model")).select_by_index(1))
    assert "small" not in one and "nano" in one
    box = figure(drawn, "conditions").find_elements(By.TAG_NAME, "input")[1]
    without = redrawn(drawn, lambda: box.send_keys(Keys.SPACE))
    assert "Q+IF " not in without and "Q+IF+CoT" in without
    redrawn(drawn, lambda: Select(figure(drawn, "experiment")).select_by_index(0))
    each = redrawn(
        drawn,
        lambda: Select(figure(drawn, "category")).select_by_visible_text("each, side by side"),
    )
    assert "Age, Q " in each and "Religion, Q+IF " in each
    effect = redrawn(drawn, lambda: Select(figure(drawn, "metric")).select_by_index(6))
    assert "Effect: Q minus the condition" in effect or "Option mass" in effect


def test_points_by_keyboard(drawn):
    """The table of points opens the same texts, for those who use no pointer."""
    drawn.find_element(By.CSS_SELECTOR, "#main-figure details summary").send_keys(Keys.ENTER)
    wait(drawn, lambda: figure(drawn, "table").find_elements(By.TAG_NAME, "button"))
    button = figure(drawn, "table").find_elements(By.TAG_NAME, "button")[-1]
    cells = button.find_elements(By.XPATH, "ancestor::tr/td")
    condition = cells[0].text
    button.send_keys(Keys.ENTER)
    wait(drawn, lambda: part(drawn, "status").text)
    assert Select(part(drawn, "condition")).first_selected_option.text == condition


def test_training_curves_have_every_logged_step(drawn):
    unfold(drawn, "training")
    marks = "#training-figure .mark-symbol.role-mark path"
    wait(drawn, lambda: len(drawn.find_elements(By.CSS_SELECTOR, marks)) == 3 * 40)
    chart = drawn.find_element(By.CSS_SELECTOR, "#training-figure [data-part=chart]")
    assert "small: reward 0.0" in chart.get_attribute("aria-label")
    note = drawn.find_element(By.CSS_SELECTOR, "#training-figure [data-part=note]").text
    assert note.startswith("Points: every logged step.")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(drawn, axe, dark):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    drawn.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        drawn.execute_script(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        wait(drawn, lambda: part(drawn, "table").text)
        drawn.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})  # past the page's policy
        found = drawn.execute_async_script("axe.run(document).then(arguments[0])")
    finally:
        drawn.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(found["passes"]) > 10
    serious = [
        (rule["id"], [node["html"][:200] for node in rule["nodes"][:3]])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
    assert serious == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The script of axe-core, from npm."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here: axe-core is NOT run")
    folder = tmp_path_factory.mktemp("axe")
    words = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--fetch-retries=0"]
    result = call([*words, f"--prefix={folder}", "axe-core@4"])
    script = folder / "node_modules/axe-core/axe.min.js"
    if result.returncode or not script.is_file():
        pytest.skip("npm cannot fetch axe-core here: it is NOT run")
    return script.read_text(encoding="utf-8")


def test_accessibility(opened):
    """Controls have names and can be reached by keyboard."""
    nameless = opened.execute_script(
        "return Array.from(document.querySelectorAll('button, input, select, [role=region], img'))"
        ".filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim()"
        " && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !one.alt)"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    unfold_texts(opened)
    unreachable = opened.execute_script(
        "return Array.from(document.querySelectorAll('button, input, select, .scroll'))"
        ".filter((one) => one.tabIndex < 0).length"
    )
    assert unreachable == 0
    opened.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the verdict"


def test_single_run_has_no_run_selector(opened):
    unfold_texts(opened)
    assert not part(opened, "run").is_displayed()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two runs: the second has one model, fewer steps and fewer items."""
    folder = tmp_path_factory.mktemp("comparison")
    first = record_run(folder / "first <b>", SMALL)
    few = Size(models=(("nano", 8192),), steps=(0, 2), templates=3, blocks=1, occupations=8,
               students=8)  # fmt: skip
    second = record_run(folder / "second", few)
    return write_comparison([first, second], folder / "out", num_resamples=20)


def test_comparison_page(chromium, comparison):
    chromium.get(comparison.as_uri())
    assert comparison.stat().st_size < 20_000_000
    unfold_texts(chromium)
    assert [one.text for one in Select(part(chromium, "run")).options] == ["first <b>", "second"]
    choose(chromium, "experiment", "Winogender")
    choose(chromium, "job", "nano")
    part(chromium, "all").click()
    assert steps_shown(chromium)[1:] == ["0", "2", "10"]
    choose(chromium, "run", "second")
    chosen = [
        Select(part(chromium, name)).first_selected_option.get_attribute("textContent")
        for name in ("experiment", "job")
    ]
    assert chosen == ["Winogender", "nano"]
    assert steps_shown(chromium)[1:] == ["0", "2"]
    lead = [one.text for one in chromium.find_elements(By.CSS_SELECTOR, ".lead")]
    assert [text.split(":")[0] for text in lead] == ["first <b>", "second"]
    unfold(chromium, "experiment-bbq")
    unfold(chromium, "run")
    assert column(chromium, BBQ, 1)[0] == "first <b>" and column(chromium, BBQ, 1)[-1] == "second"
    differing = column(chromium, 'table[aria-labelledby="recipes-differ"]', 1)
    assert differing == []  # the recorded recipes are alike
    assert chromium.get_log("browser") == []


def test_narrow_screen(opened):
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
        wait(opened, lambda: opened.execute_script(widths)[0] <= 360)
        assert opened.execute_script(widths)[1] == 360
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_javascript(page):
    driver = start(javascript=False)
    try:
        driver.get(page.as_uri())
        assert "less bias" in driver.find_element(By.CSS_SELECTOR, ".lead").text
        driver.find_element(By.CSS_SELECTOR, "#experiment-bbq > summary").click()
        assert "nano" in driver.find_element(By.CSS_SELECTOR, BBQ).text
        assert driver.find_element(By.TAG_NAME, "img").is_displayed()
        assert not driver.find_element(By.ID, "browser").is_displayed()
        said = driver.find_elements(By.TAG_NAME, "noscript")
        assert any("JavaScript" in one.get_attribute("textContent") for one in said)
        shown = [b for b in driver.find_elements(By.TAG_NAME, "button") if b.is_displayed()]
        assert shown == []  # no button that does nothing
    finally:
        driver.quit()
