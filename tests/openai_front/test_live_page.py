"""The page for browsers, in a real one: it chats, shows both stages, and takes nothing that it is told for HTML."""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from ensemble.openai_front.live_page import NUMBERS, TIMES, totals_of
from ensemble.serving.metric_families import FAMILIES
from tools.server.triton_server import TritonServer

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PROMPT = "The capital of France is <b>not</b> & never \"'&lt;"
NUM_TOKENS = 12
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, openai_server: TritonServer) -> Iterator[Page]:
    """Loaded, and at the test's end without a complaint: what the policy forbids is one, too."""
    with browser.new_context() as context:
        found = context.new_page()
        complaints: list[str] = []
        found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: complaints.append(str(error)))
        found.set_default_timeout(20_000)
        found.goto(openai_server.page_url)
        expect(found.locator("#state")).to_have_text("serving")
        yield found
        assert [each for each in complaints if not re.search("status of 40[01]", each)] == []


def go_on_and_on(route: Route) -> None:
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


# By the page itself, as soon as there is an answer to stop: a click from outside may come after its end.
STOPS_AT_ONCE = """new MutationObserver((_, observer) => {
  const stop = document.getElementById("stop");
  if (!stop.hidden && document.querySelectorAll(".assistant")[1]?.textContent) { observer.disconnect(); stop.click(); }
}).observe(document.body, {attributes: true, childList: true, characterData: true, subtree: true})"""


def state(server: TritonServer) -> Any:
    with urllib.request.urlopen(f"{server.page_url}page/state", timeout=20) as response:
        return json.load(response)


def test_its_metrics_exist() -> None:
    assert {name.removesuffix("_count") for name in NUMBERS.values()} | set(TIMES.values()) <= set(FAMILIES)


def test_samples_are_added_up_over_their_labels() -> None:
    text = '# HELP a b\na{x="1 {2"} 3\na{x="2"} 4.5\nb 1e3\n'
    assert totals_of(text) == {"a": 7.5, "b": 1000.0}


@pytest.mark.server
def test_a_strict_policy_and_no_other_files(openai_server: TritonServer) -> None:
    for path in ("", "page/page.js", "page/page.css"):
        with urllib.request.urlopen(openai_server.page_url + path, timeout=20) as response:
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'" in policy and "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("page/live_page.py", "page/../app.py", "page/index.html"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(openai_server.page_url + path, timeout=20)


@pytest.mark.server
def test_the_state_is_the_servers(openai_server: TritonServer, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny-chat", prompt="Hello", max_tokens=3)
    found = state(openai_server)
    assert (found["model"], found["max_model_len"], found["is_ready"]) == ("tiny-chat", 4096, True)
    assert set(found["numbers"]) == set(NUMBERS)
    assert set(found["times"]) == set(TIMES)
    assert [(each["role"], each["state"]) for each in found["replicas"]] == [("prefill", "up"), ("decode", "up")]
    assert all(each["num_blocks"] > 0 for each in found["replicas"])


@pytest.mark.server
def test_it_chats_and_shows_both_stages(page: Page, client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    sampling: dict[str, Any] = {"model": "tiny-chat", "max_tokens": NUM_TOKENS, "temperature": 0}
    answers = [client.chat.completions.create(messages=messages, **sampling)]
    messages += [{"role": "assistant", "content": answers[0].choices[0].message.content}]
    messages += [{"role": "user", "content": "And then?"}]
    answers += [client.chat.completions.create(messages=messages, **sampling)]
    page.fill("#max-tokens", str(NUM_TOKENS))
    for number, (said, answer) in enumerate(zip([PROMPT, "And then?"], answers, strict=True)):
        page.fill("#text", said)
        page.press("#text", "Enter")
        shown = page.locator(".assistant").nth(number)
        expect(shown.locator(".note")).to_contain_text(f"{answer.usage.completion_tokens} tokens, first after")
        assert page.locator(".user").nth(number).text_content() == said
        assert shown.evaluate("each => each.firstChild.data") == answer.choices[0].message.content
    page.select_option("#kind", "text")
    page.fill("#text", "Once")
    page.click("#send")
    expect(page.locator(".assistant").nth(2)).to_contain_text(re.compile(r"^Once.*first after", re.DOTALL))
    rows = page.locator("#replicas tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text(re.compile(r"0prefillupcpu\d+\d+ of \d+"))
    expect(rows.nth(1)).to_contain_text(re.compile(r"1decodeupcpu\d+\d+ of \d+"))
    expect(page.locator("#answers")).to_contain_text(re.compile(r"[1-9]\d* in all"))
    expect(page.locator("#ttft")).to_contain_text("ms")
    assert page.locator("polyline").count() == 3


@pytest.mark.server
def test_an_error_and_a_stop_are_told(page: Page) -> None:
    page.fill("#max-tokens", "5000")
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    expect(page.locator(".note.bad")).to_contain_text("maximum context length is 4096 tokens")
    page.route("**/v1/chat/completions", go_on_and_on)
    page.fill("#max-tokens", "4000")
    page.fill("#text", "Hello")
    page.evaluate(STOPS_AT_ONCE)
    page.press("#text", "Enter")
    expect(page.locator(".note").nth(1)).to_have_text("stopped")
    expect(page.locator("#send")).to_be_enabled()


@pytest.mark.server
def test_it_asks_for_a_key_where_one_is_needed(page: Page) -> None:
    events = [{"choices": [{"delta": {"content": "Yes"}}]}, {"choices": [], "usage": {"completion_tokens": 1}}]

    def answer(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer my key":
            body = "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"
            route.fulfill(status=200, content_type="text/event-stream", body=body)
        else:
            route.fulfill(status=401, json={"error": {"message": "Incorrect API key"}})

    page.route("**/v1/chat/completions", answer)
    expect(page.locator("#key")).to_be_hidden()
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    expect(page.locator(".note.bad")).to_have_text("Incorrect API key")
    page.fill("#key", "my key")
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    expect(page.locator(".assistant").nth(1)).to_contain_text("Yes")


@pytest.mark.server
def test_what_a_model_says_is_text(page: Page) -> None:
    said = "<img src=x onerror=alert(1)><script>alert(2)</script>\n\n</div>**bold** data: [DONE]"
    events = [{"choices": [{"delta": {"content": said}}]}, {"choices": [], "usage": {"completion_tokens": 2}}]
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    expect(page.locator(".assistant .note")).to_contain_text("2 tokens")
    assert (page.locator(".assistant").text_content() or "").startswith(said)
    assert page.locator("#messages img, #messages script").count() == 0
