"""Every control of the page, in headless Chromium."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_ray.serve.page.feedback import read_feedback
from tests.support.local_page import ScriptedGateway, red_png, run_page
from tests.support.wait import wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.flaky(reruns=2),  # a real browser on a busy machine
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium"),
]
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PATIENCE_MS = 120_000
QUIET_MS = 500
sync_api.expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def gateway() -> ScriptedGateway:
    return ScriptedGateway()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def address(gateway: ScriptedGateway, log: Path) -> Iterator[str]:
    with run_page(gateway, feedback_dir=str(log)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox", *FAKE_CAMERA]}
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = open_page(browser, f"{address}/?model=echo")
    yield page
    page.context.close()


class Traffic:
    """The requests that a page has sent to the server, and those still running."""

    def __init__(self, page: Any) -> None:
        self.num_asked = 0
        self.under_way: set[Any] = set()
        page.on("request", self._begin)
        page.on("requestfinished", self._end)
        page.on("requestfailed", self._end)

    def _begin(self, request: Any) -> None:
        self.num_asked += 1
        self.under_way.add(request)

    def _end(self, request: Any) -> None:
        self.under_way.discard(request)


def open_page(browser: Any, url: str, **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.traffic = Traffic(page)
    page.goto(url)
    page.locator("#chat .example").first.wait_for()
    sync_api.expect(page.locator("#model input")).not_to_have_value("")
    settle(page)
    return page


def settle(page: Any) -> None:
    """Wait until the page has no running requests: Gradio may lose actions during one.

    Playwright's state "networkidle" does not help: once reached, it stays.
    """
    num_asked = -1
    while page.traffic.under_way or page.traffic.num_asked != num_asked:
        num_asked = page.traffic.num_asked
        page.wait_for_timeout(QUIET_MS)


def send(page: Any, text: str) -> None:
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def ask(page: Any, text: str) -> None:
    send(page, text)
    see(page, "#chat", f"heard: {text}")
    wait_until_answered(page)


def wait_until_answered(page: Any) -> None:
    page.locator("#box button[aria-label=Submit]").wait_for()


def see(page: Any, place: str, text: str) -> None:
    page.locator(place).get_by_text(text).last.wait_for()


def attach(page: Any, *names: str) -> None:
    files = [{"name": name, "mimeType": "image/png", "buffer": red_png()} for name in names]
    page.locator("#box input[type=file]").set_input_files(files)
    page.locator("#box img").nth(len(names) - 1).wait_for()


def test_the_address_chooses_a_model_and_the_list_is_sorted_and_reloads(
    page: Any, gateway: ScriptedGateway
) -> None:
    model = page.locator("#model input")
    assert model.input_value() == "echo"
    gateway.models.append("a-new-one")
    page.locator("#reload").click()
    settle(page)
    model.click()
    options = page.get_by_role("option")
    sync_api.expect(options).to_have_count(5)
    names = [name.split()[-1] for name in options.all_inner_texts()]
    gateway.models.remove("a-new-one")
    assert names == ["a-new-one", "broken", "echo", "endless", "other"]


def test_images_in_any_turn_and_a_question_edited_and_answered_again(
    page: Any, gateway: ScriptedGateway
) -> None:
    attach(page, "a.png", "b.png")
    ask(page, "Two")
    attach(page, "c.png")
    ask(page, "Three")
    see(page, "#chat", "heard: Three (3 images)")
    page.get_by_role("button", name="Edit question").click()
    page.locator("#box img").wait_for()
    sync_api.expect(page.locator("#box textarea")).to_have_value("Three")
    settle(page)
    ask(page, "Changed")
    see(page, "#chat", "heard: Changed (3 images)")
    sync_api.expect(page.get_by_text("heard: Three")).to_have_count(0)
    num_asked = len(gateway.bodies)
    page.get_by_role("button", name="Regenerate").click()
    while len(gateway.bodies) == num_asked:
        page.wait_for_timeout(50)
    wait_until_answered(page)
    assert gateway.bodies[num_asked]["messages"] == gateway.bodies[num_asked - 1]["messages"]
    page.get_by_role("button", name="Clear").last.click()
    page.locator("#chat .example").first.wait_for()


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(page: Any, event: str) -> None:
    page.evaluate(
        """([event, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "x.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            const place = document.querySelector("#box textarea");
            place.dispatchEvent(event == "paste"
                ? new ClipboardEvent("paste", {...options, clipboardData: data})
                : new DragEvent("drop", {...options, dataTransfer: data}));
        }""",
        [event, list(red_png())],
    )
    page.locator("#box img").wait_for()
    ask(page, "What?")
    see(page, "#chat", "(1 images)")


def test_the_camera_takes_an_image(page: Any) -> None:
    page.locator("#camera > button").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.readyState === 4")
    page.locator("#camera").get_by_role("button", name=re.compile("capture", re.I)).click()
    page.locator("#box img").wait_for()
    ask(page, "Who?")
    see(page, "#chat", "(1 images)")


def test_settings_and_the_image_mode_reach_the_gateway(page: Any, gateway: ScriptedGateway) -> None:
    ask(page, "Defaults")
    sent = gateway.bodies[-1]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.2, 0.7, 512)
    page.get_by_role("button", name="Parameters").click()
    temperature = page.locator("#parameters input[type=number]").first
    sync_api.expect(temperature).to_have_value("0.2")
    slider = page.locator("#parameters input[type=range]").first

    def is_set() -> bool:  # Gradio loses what is typed before the panel has its handlers
        temperature.fill("1")
        temperature.press("Tab")
        return slider.input_value() == "1"

    wait_until(is_set, "the temperature is 1")
    page.locator("#parameters").get_by_label("resize").check()
    attach(page, "a.png")
    ask(page, "Changed")
    sent = gateway.bodies[-1]
    assert sent["temperature"] == 1
    assert sent["messages"][-1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg")


def test_stop_keeps_what_is_there(page: Any, browser: Any, address: str) -> None:
    other = open_page(browser, f"{address}/?model=endless")
    send(other, "Go")
    see(other, "#chat", "on and on")
    ask(page, "Meanwhile")  # two visitors at once
    other.locator("#box button[aria-label=Stop]").click()
    see(other, "#chat", "stopped")
    assert other.get_by_text("Meanwhile").count() == 0
    other.context.close()


def test_an_error_has_its_cause_and_request_id(browser: Any, address: str) -> None:
    page = open_page(browser, f"{address}/?model=broken")
    send(page, "Hi")
    see(page, "#chat", "it broke: ask another model [request page-")
    page.context.close()


def test_markdown_and_code_are_rendered_with_tokens_and_time(page: Any) -> None:
    send(page, "markdown")
    for part in ("h2", "li strong", "pre code.language-python", "td", "small.figures"):
        page.locator(f"#chat {part}").first.wait_for()
    figures = page.locator("#chat small.figures")
    sync_api.expect(figures).to_have_text(re.compile(r"\d+ tokens · \d+\.\d s"))


def test_an_example_and_the_chips_of_a_scene_are_asked(page: Any) -> None:
    page.locator("#chat .example").first.click()
    see(page, "#chat", "(1 images)")
    wait_until_answered(page)
    page.get_by_role("button", name="Draw a new scene").click()
    page.get_by_role("button", name="Describe the picture.").click()
    see(page, "#chat", "heard: Describe the picture. (2 images)")


def test_votes_and_a_correction_are_recorded(page: Any, log: Path) -> None:
    see(page, "#privacy", "This page records")
    ask(page, "Vote")
    for name in ("👍 Good", "⚑ Flag"):
        page.get_by_role("button", name=name).click()
        page.get_by_text("Thank you").last.wait_for()
    page.get_by_role("button", name="Correct").click()
    page.locator("#correction textarea").fill("Better")
    page.get_by_role("button", name="Record the correction").click()
    see(page, "#chat", "Better")
    settle(page)
    row = next(row for row in read_feedback(log) if "Vote" in str(row["conversations"]))
    assert (row["vote"], row["flag"], row["corrected"]) == ("up", True, "Better")


def test_two_models_answer_side_by_side_and_are_compared(page: Any, log: Path) -> None:
    page.locator("#double input").check()
    page.locator("#other-chat").wait_for()
    settle(page)
    page.locator("#other-model input").fill("other")
    page.locator("#other-model input").press("Enter")
    settle(page)
    send(page, "Both")
    see(page, "#chat", "echo heard: Both")
    see(page, "#other-chat", "other heard: Both")
    page.get_by_role("button", name="Right is better").click()
    page.get_by_text("Thank you").last.wait_for()
    assert json.loads((log / "votes.jsonl").read_text().splitlines()[-1])["better"] == "right"


def test_the_conversation_is_downloaded_with_its_images(page: Any) -> None:
    attach(page, "a.png")
    ask(page, "Keep")
    with page.expect_download() as download:
        page.locator("#actions").get_by_text("Download").click()
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    (row,) = json.loads(archive.read("conversation.json"))
    assert row["conversations"][0]["value"] == "<image>\nKeep"
    assert archive.read(row["image"]) == red_png()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, address: str, scheme: str) -> None:
    size = {"width": 390, "height": 844}
    page = open_page(browser, f"{address}/?model=echo", viewport=size, color_scheme=scheme)
    send(page, "markdown")
    page.locator("#chat small.figures").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (page.locator("body.dark").count() == 1) == (scheme == "dark")
    page.context.close()


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(page: Any) -> None:
    reached = {}
    page.locator("#model input").focus()
    settle(page)  # the list of models is refreshed
    for _ in range(40):
        name, outline = page.evaluate(
            """() => { const on = document.activeElement; return [
                on.ariaLabel || on.innerText || on.placeholder || on.type || on.id,
                getComputedStyle(on).outlineStyle + getComputedStyle(on).boxShadow] }"""
        )
        reached[name.strip().splitlines()[0] if name.strip() else ""] = outline
        page.keyboard.press("Tab")
    for name in ("⟳ Models", "Draw a new scene", "Clear", "Ask about images", "Submit"):
        assert name in reached
    assert "solid" in reached["Draw a new scene"]
