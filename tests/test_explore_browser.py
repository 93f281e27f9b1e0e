"""The explorer in a real browser, chromium driven by playwright: one visit, many checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashmaps as fm
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

from explored import png, serving  # noqa: E402
from flashmaps.diffusion.features import load_model  # noqa: E402
from flashmaps.explorer.guard import Rules  # noqa: E402
from flashmaps.explorer.pictures import BUNDLED  # noqa: E402
from flashmaps.explorer.view import Model  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM,
    reason="no chromium here: apt install chromium (`make setup` tries it), or put one on PATH",
)


@pytest.fixture(scope="module")
def rules() -> Iterator[Rules]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def side() -> int:
    """Tokens in a row: the built-in model's own size has one for each four pixels."""
    return Model(load_model("builtin"), "builtin").told()["own"]["size"] // 4


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Root, as in containers, has no sandbox; the page comes from this machine alone.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Page:
    """A page, what it complained of, and what it asked for."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.complaints.append(line.text) if line.type == "error" else None,
        )
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("[data-ready]")

    def find(self, name: str) -> Any:
        return self.page.locator(f'[data-id="{name}"]')

    def at(self, side: str, x: float, y: float, how: str = "hover") -> None:
        """Do something at a place of the unit square of a picture."""
        stage = self.find(f"{side}-stage")
        box = stage.bounding_box()
        getattr(stage, how)(position={"x": x * box["width"], "y": y * box["height"]})

    def wait(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="attached")

    def until(self, condition: str, *given: Any) -> None:
        """Until a JavaScript function, of the values given, says so."""
        self.page.wait_for_function(condition, arg=given[0] if given else None)

    def said(self, text: str) -> None:
        """Until a screen reader is told this."""
        self.until("t => document.querySelector('[role=status]').textContent.includes(t)", text)

    def lit(self, side: str) -> int:
        """How many pixels of a heat map are drawn."""
        return self.page.evaluate(
            """side => { const c = document.querySelector(`[data-id="${side}-heat"]`);
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }""",
            side,
        )

    def settle(self) -> None:
        """Until what is drawn is drawn."""
        self.page.evaluate(
            "() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"
        )

    def ready(self, act: Any) -> None:
        """Act, and wait until the page has looked anew."""
        before = int(self.page.get_attribute(".fm-explorer", "data-ready"))
        act()
        self.until("n => Number(document.querySelector('.fm-explorer').dataset.ready) > n", before)


@pytest.fixture(scope="module")
def visit(browser: Any, rules: Rules) -> Iterator[Page]:
    page = Page(browser, f"http://127.0.0.1:{rules.port}/", viewport={"width": 1366, "height": 800},
                bypass_csp=False)  # fmt: skip
    yield page
    page.context.close()


def test_the_page_opens_with_two_pictures_and_nothing_from_outside(visit: Page) -> None:
    assert visit.page.title() == "FlashMaps"
    assert visit.find("model").inner_text() == "builtin"
    for side in ("source", "target"):
        assert (
            visit.page.evaluate(
                "s => document.querySelector(`[data-id='${s}-image']`).naturalWidth", side
            )
            == 512
        )
    assert all(each.startswith(("http://127.0.0.1:", "blob:", "data:")) for each in visit.asked)
    assert visit.complaints == []


def test_pointing_shows_where_a_token_looks(visit: Page, side: int) -> None:
    assert visit.lit("target") == 0
    visit.at("source", 0.22, 0.33)
    row, column = int(0.33 * side), int(0.22 * side)
    visit.wait(f'[data-token="source:{row * side + column}"]')
    visit.settle()
    assert visit.lit("source") > 0 and visit.lit("target") > 0
    assert visit.find("r-token").inner_text() == f"{row + 1}, {column + 1}"
    assert "nats" in visit.find("r-entropy").inner_text()
    visit.at("target", 0.5, 0.5)
    visit.wait('[data-token^="target:"]')
    visit.wait("[data-latency]")
    print("pointer to picture, ms:", visit.page.get_attribute(".fm-explorer", "data-latency"))


def test_a_click_pins_and_a_key_unpins(visit: Page) -> None:
    visit.at("source", 0.22, 0.33, "click")
    visit.wait(".fm-pins li")
    text = visit.find("pins").inner_text()
    assert "confidence" in text and "comes back" in text
    visit.page.get_by_role("button", name="Remove pin 1").click()
    assert visit.find("pins").locator("li").count() == 0


def test_keys_move_pin_and_say_what_they_did(visit: Page, side: int) -> None:
    visit.find("source-stage").focus()
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("ArrowRight")
    middle = side // 2 * (side + 1)
    visit.wait(f'[data-token="source:{middle}"]')
    visit.page.keyboard.press("ArrowRight")
    visit.wait(f'[data-token="source:{middle + 1}"]')
    visit.page.keyboard.press("Shift+ArrowUp")
    visit.wait(f'[data-token="source:{middle + 1 - 4 * side}"]')
    visit.said(f"row {side // 2 - 3}, column {side // 2 + 2}")
    visit.page.keyboard.press("Enter")
    visit.wait(".fm-pins li")
    visit.page.keyboard.press("Delete")
    assert visit.find("pins").locator("li").count() == 0


def test_every_control_has_a_name(visit: Page) -> None:
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [tabindex="0"]')].filter(e =>
        !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()
        ).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    ids = visit.page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert visit.find("source-stage").get_attribute("aria-label") == "Source: one.jpg"


def test_other_maps_are_chosen(visit: Page) -> None:
    visit.ready(lambda: visit.find("compare").select_option("kk"))
    assert visit.find("head").locator("option").count() == 3  # two heads, and their mean
    visit.ready(lambda: visit.find("head").select_option("1"))
    visit.page.get_by_text("Layers", exact=True).click()
    boxes = visit.find("layers").locator("input")
    visit.ready(lambda: boxes.nth(5).check())
    visit.ready(lambda: boxes.nth(5).uncheck())
    visit.find("timestep").fill("4000")
    visit.find("timestep").press("Enter")
    visit.wait(".fm-alert:not([hidden])")
    assert "it takes 0 to 999" in visit.find("alert-text").inner_text()
    visit.find("timestep").fill("")
    visit.ready(lambda: visit.find("timestep").press("Enter"))
    assert visit.find("alert").is_hidden()
    visit.ready(lambda: visit.find("compare").select_option(""))


def test_statistics_segments_and_words_lie_over_the_picture(visit: Page) -> None:
    visit.find("statistic").select_option("density")
    visit.wait(".fm-scale:not([hidden])")
    assert "tokens" in visit.find("high").inner_text()
    visit.find("statistic").select_option("")
    visit.page.check('input[name="fm-segments"][value="0"]')
    visit.said(" objects, ")
    visit.page.check('input[name="fm-segments"][value=""]')
    visit.find("prompt").fill("a cat")
    visit.find("prompt").press("Enter")
    visit.wait(".fm-words button[aria-pressed=true]")
    assert visit.find("words").inner_text().split() == ["a", "cat"]
    visit.find("words").get_by_text("cat").click()


def test_a_picture_is_added_and_seen_in_all(visit: Page, tmp_path: Path) -> None:
    new = tmp_path / "mine <b>.png"
    new.write_bytes(png(64, 96))
    visit.ready(lambda: visit.find("file").set_input_files(new))
    assert visit.find("source-picture").locator("option").all_inner_texts()[-1] == "mine <b>.png"
    visit.find("collect").check()
    visit.at("source", 0.5, 0.5)
    visit.wait('[data-others="2"]')
    visit.find("collect").uncheck()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    visit.find("file").set_input_files(bad)
    visit.wait(".fm-alert:not([hidden])")
    assert "no PNG, JPEG or WebP" in visit.find("alert-text").inner_text()
    visit.ready(lambda: visit.page.get_by_role("button", name="Remove mine <b>.png").click())
    assert visit.find("thumbs").locator("li").count() == 2


def test_what_is_seen_is_saved(visit: Page, side: int, tmp_path: Path) -> None:
    from PIL import Image

    visit.page.evaluate("() => scrollTo(0, 0)")  # else the buttons scroll what is pointed at
    visit.at("source", 0.22, 0.33)
    token = int(0.33 * side) * side + int(0.22 * side)
    visit.wait(f'[data-token="source:{token}"]')
    with visit.page.expect_download() as saved:
        visit.find("png").click()
    with Image.open(saved.value.path()) as image:
        assert image.format == "PNG" and image.size == (1296, 640)
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 1000
    visit.find("python").click()
    visit.wait("dialog[open]")
    program = visit.find("code").inner_text()
    assert "fm.match(" in program and f"rows([{token}])" in program
    compile(program, "explore.py", "exec")
    with visit.page.expect_download() as saved:
        visit.find("save").click()
    assert Path(saved.value.path()).read_text() == program
    visit.page.keyboard.press("Escape")


def test_a_visit_goes_on_after_a_reload(visit: Page) -> None:
    visit.page.reload()
    visit.wait("[data-ready]")
    # Whatever refusals made on purpose put on the console; nothing else.
    assert all("status of 400" in each for each in visit.complaints), visit.complaints


@pytest.mark.slow
def test_a_generation_is_looked_through(visit: Page) -> None:
    visit.find("g-prompt").fill("a red bird")
    visit.find("g-steps").fill("3")
    visit.page.get_by_role("button", name="Make").click()
    visit.wait(".fm-chart polyline")
    visit.find("g-step").press("ArrowLeft")
    visit.until("() => document.querySelector('[data-id=g-told]').textContent.includes('step 2')")


def test_light_dark_and_phone(browser: Any, rules: Rules, tmp_path: Path) -> None:
    phone = Page(browser, f"http://127.0.0.1:{rules.port}/", color_scheme="dark", has_touch=True,
                 is_mobile=True, viewport={"width": 390, "height": 844})  # fmt: skip
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert phone.page.evaluate(wide) == 0
    small = phone.page.evaluate(
        """() => [...document.querySelectorAll('button, select')].filter(e => e.offsetParent &&
        e.getBoundingClientRect().height < 24).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert small == []
    ground = "() => getComputedStyle(document.querySelector('.fm-explorer')).backgroundColor"
    assert phone.page.evaluate(ground) == "rgb(19, 18, 22)"
    phone.find("theme").tap()
    assert phone.page.evaluate(ground) == "rgb(250, 249, 247)"
    phone.at("source", 0.3, 0.4, "tap")
    phone.wait(".fm-pins li")
    assert phone.complaints == []
    phone.context.close()


def test_failures_have_a_page(browser: Any, rules: Rules) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{rules.port}/nowhere")
    assert "no such page" in page.inner_text("main")
    page.route("**/api/**", lambda route: route.abort())
    page.click("main a")
    page.wait_for_selector(".fm-alert:not([hidden])")
    assert "still running" in page.inner_text(".fm-alert")
    page.unroute("**/api/**")
    page.click("text=Try again")
    page.wait_for_selector("[data-ready]", timeout=60_000)
    assert page.is_hidden(".fm-alert")
    context.close()


@pytest.mark.slow  # loads the view a second time, and a match
def test_the_widget_shows_the_same_view(browser: Any) -> None:
    pytest.importorskip("anywidget")
    from flashmaps.explorer.widget import module

    match = fm.match(BUNDLED / "one.jpg", BUNDLED / "two.jpg")
    widget = fm.explore(match)
    sent: list[Any] = []
    widget.send = lambda message, buffers=(): sent.append((message, [list(b) for b in buffers]))

    def ask(text: str) -> Any:
        sent.clear()
        widget._asked(widget, json.loads(text), [])
        return sent[0]

    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.expose_function("ask", ask)
    page.set_content("<div id=cell></div>")
    page.add_style_tag(content=widget._css)
    stub = """
    let heard = null;
    const model = { on: (_, f) => { heard = f; }, off: () => {}, send: async (message) => {
      const [answer, buffers] = await window.ask(JSON.stringify(message));
      heard(answer, buffers.map((each) => new DataView(new Uint8Array(each).buffer)));
    } };
    render({ model, el: document.getElementById("cell") });
    """
    page.add_script_tag(content=module() + stub, type="module")
    page.wait_for_selector("[data-ready]", timeout=120_000)
    page.locator('[data-id="source-stage"]').click(position={"x": 60, "y": 60})
    page.wait_for_selector(".fm-pins li", timeout=120_000)
    page.select_option('[data-id="compare"]', "qk")
    page.wait_for_selector('[data-ready="2"]')
    page.fill('[data-id="prompt"]', "a cat")
    page.press('[data-id="prompt"]', "Enter")
    page.wait_for_selector(".fm-alert:not([hidden])")
    assert "has no model" in page.inner_text(".fm-alert")
    assert complaints == []
    context.close()
