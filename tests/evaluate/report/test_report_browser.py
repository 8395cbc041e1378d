"""The report in headless Chromium: sorting, filtering and the transcript browser.

Needs the `selenium` package, and Chromium with its driver on the PATH (Debian: chromium and
chromium-driver); skips where they are missing.
"""

import shutil

import pyarrow.parquet as pq
import pytest

from selfcorrect.evaluate.report.page import write_comparison, write_report
from tests.support.recorded_run import HOSTILE, SMALL, Size, record_run

pytestmark = pytest.mark.browser

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = record_run(tmp_path_factory.mktemp("browser") / "run # 1", SMALL)
    for path in run.glob("*/seed-*/ppo/checkpoint-*/evaluation/bbq.*.parquet"):
        rewrite(path, rename)
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
    return driver.find_element(By.CSS_SELECTOR, f"[data-part={name}]")


def column(driver, table, place):
    cells = driver.find_elements(By.CSS_SELECTOR, f"{table} tbody tr td:nth-child({place})")
    return [cell.text for cell in cells if cell.is_displayed()]


BBQ = 'table[aria-labelledby="results-bbq"]'


def test_no_network_access(opened, page):
    loaded = opened.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert page.stat().st_size < 20_000_000


def test_sorting_by_keyboard(opened):
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
    label = "Filter rows of BBQ: every checkpoint and condition"
    field = opened.find_element(By.CSS_SELECTOR, f'input[aria-label="{label}"]')
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
    Select(part(opened, "experiment")).select_by_visible_text("Winogender")
    Select(part(opened, "model")).select_by_visible_text("nano, seed 0")
    part(opened, "search").send_keys("occupation-7")
    items = [option.text for option in Select(part(opened, "item")).options]
    assert items == ["occupations: occupation-7.txt"]
    assert part(opened, "status").text == "1 item of 10 found"
    table = part(opened, "table")
    assert "occupation-7.txt" in table.find_element(By.TAG_NAME, "caption").text
    heads = [h.text for h in table.find_elements(By.CSS_SELECTOR, "thead th")]
    assert heads == ["Step", "Q", "Q+IF", "Q+IF+CoT", "Match stats"]
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert [r.find_element(By.TAG_NAME, "th").text for r in rows] == ["Asked", "0", "2", "10"]
    cot = rows[-1].find_elements(By.TAG_NAME, "td")[2].text
    assert "Model's text: Both could be true. So it goes." in cot
    assert "cut off at the token limit" in cot  # the recorded run cuts every seventh
    assert "his 0." in cot and "chosen" in cot and "probability on the options 0.900" in cot
    part(opened, "conditions").find_elements(By.TAG_NAME, "input")[1].click()
    heads = [h.text for h in part(opened, "table").find_elements(By.CSS_SELECTOR, "thead th")]
    assert heads == ["Step", "Q", "Q+IF+CoT", "Match stats"]
    part(opened, "search").send_keys(" no such word")
    assert Select(part(opened, "item")).options == []
    assert part(opened, "table").text == ""


def test_previous_and_next_item(opened):
    first = part(opened, "table").find_element(By.TAG_NAME, "caption").text
    part(opened, "next").send_keys(Keys.ENTER)
    assert part(opened, "status").text.startswith("Item 2 of 40: ")
    assert part(opened, "table").find_element(By.TAG_NAME, "caption").text != first
    part(opened, "previous").send_keys(Keys.ENTER)
    assert part(opened, "table").find_element(By.TAG_NAME, "caption").text == first
    assert part(opened, "status").get_attribute("role") == "status"


def test_hostile_texts_are_escaped(opened):
    part(opened, "search").send_keys("onerror")
    table = part(opened, "table")
    assert "Age/0</script><img src=x onerror=" in table.text
    assert "<script>document.title='taken'</script>⟨U+202E⟩txet desrever⟨U+0007⟩" in table.text
    assert f"cut here; {len(MEGABYTE):,} characters in all" in table.text
    assert "\u202e" not in table.text and "\x07" not in table.text
    assert table.find_elements(By.CSS_SELECTOR, "img, script") == []
    assert len(opened.find_elements(By.TAG_NAME, "script")) == 2


def test_accessibility(opened):
    """Controls have names and can be reached by keyboard."""
    nameless = opened.execute_script(
        "return Array.from(document.querySelectorAll('button, input, select, [role=region], img'))"
        ".filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim()"
        " && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !one.alt)"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    unreachable = opened.execute_script(
        "return Array.from(document.querySelectorAll('button, input, select, .scroll'))"
        ".filter((one) => one.tabIndex < 0).length"
    )
    assert unreachable == 0
    opened.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the verdict"


def test_single_run_has_no_run_selector(opened):
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
    runs = Select(part(chromium, "run"))
    assert [one.text for one in runs.options] == ["first <b>", "second"]
    Select(part(chromium, "experiment")).select_by_visible_text("Winogender")
    Select(part(chromium, "model")).select_by_visible_text("nano, seed 0")
    Select(part(chromium, "item")).select_by_visible_text("occupations: occupation-5.txt")
    steps = "tbody th"
    table = part(chromium, "table")
    assert [h.text for h in table.find_elements(By.CSS_SELECTOR, steps)][1:] == ["0", "2", "10"]
    runs.select_by_visible_text("second")
    chosen = [
        Select(part(chromium, name)).first_selected_option.text
        for name in ("experiment", "model", "item")
    ]
    assert chosen == ["Winogender", "nano, seed 0", "occupations: occupation-5.txt"]
    assert [h.text for h in table.find_elements(By.CSS_SELECTOR, steps)][1:] == ["0", "2"]
    runs.select_by_visible_text("first <b>")
    Select(part(chromium, "item")).select_by_visible_text("occupations: occupation-9.txt")
    runs.select_by_visible_text("second")  # has no such occupation: its first item instead
    assert Select(part(chromium, "item")).first_selected_option.text != ""
    assert part(chromium, "table").text != ""
    assert column(chromium, BBQ, 1)[0] == "first <b>" and column(chromium, BBQ, 1)[-1] == "second"
    differing = column(chromium, 'table[aria-labelledby="recipes-differ"]', 1)
    assert differing == []  # the recorded recipes are alike
    assert chromium.get_log("browser") == []


def test_narrow_screen(opened):
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
        scrolls, shows = opened.execute_script(widths)
        assert scrolls <= shows == 360
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_javascript(page):
    driver = start(javascript=False)
    try:
        driver.get(page.as_uri())
        assert "nano" in driver.find_element(By.CSS_SELECTOR, BBQ).text
        assert driver.find_element(By.TAG_NAME, "img").is_displayed()
        assert not driver.find_element(By.ID, "browser").is_displayed()
        said = driver.find_element(By.TAG_NAME, "noscript").text
        assert "JavaScript" in said
        shown = [b for b in driver.find_elements(By.TAG_NAME, "button") if b.is_displayed()]
        assert shown == []  # no button that does nothing
    finally:
        driver.quit()
