"""The page in a real browser: it streams, shows probabilities, outlives engines and servers, and fits every window.

``TENON_PICTURES=docs/img`` keeps the pictures that the last test takes.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.browser import Browser, BrowserError, Page, binary
from tests.server.conftest import Running, free_port, launch, wait_for, write_model
from tests.server.test_lifecycle import alive

Start = Callable[..., Running]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(binary() is None, reason="no Chromium in PATH (Debian: apt-get install chromium)"),
]

WIDTHS = (390, 768, 1280, 1920)
THEMES = ("light", "dark")
MAX_PICTURE_BYTES = 300_000
KEY = "alice-0123456789abcdef"
GUESSING = ("--speculative", "suffix,ngram", "--speculative-policy", "fixed-tree")
IDLE = "!document.querySelector('.message.busy') && document.querySelector('.message')"
READY = "document.querySelector('#state').dataset.state === 'ready'"

WIDER = """
(() => [...document.querySelectorAll('body *')].filter((it) => {
  const at = it.getBoundingClientRect();
  if (!at.width || it.closest('pre, svg')) return false;
  return at.right > innerWidth + 0.5 || at.left < -0.5;
}).map((it) => `${it.tagName}.${it.className}#${it.id}`)
  .concat(document.scrollingElement.scrollWidth > innerWidth ? ['the document'] : []))()
"""
"""Elements that reach beyond the window; what is inside a block of code scrolls there."""

PALE = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const painted = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const it = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !it.checkVisibility() || it.closest(':disabled')) continue;
    const grounds = [];
    for (let at = it; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const [a, b] = [light(painted(grounds)), light(painted([...grounds, getComputedStyle(it).color]))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.add(`${it.className} ${contrast.toFixed(2)}: ${it.textContent.slice(0, 20)}`);
  }
  return [...found];
})()
"""
"""Texts whose contrast with what is behind them is less than WCAG's 4.5."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(binary() or "", tmp_path_factory.mktemp("profile")) as running:
        try:
            running.call("Browser.getVersion")
        except BrowserError as error:
            pytest.skip(f"{binary()} does not start here: {error}")
        yield running


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a last token: answers are as long as they may be."""
    folder = write_model(tmp_path_factory.mktemp("endless"))
    (folder / "generation_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def serving(endless: Path) -> Iterator[Start]:
    """Starts servers for one test on a port that may be given again."""
    started: list[Running] = []

    def begin(*options: str, port: int | None = None) -> Running:
        at = port or free_port()
        command = ["-m", "tenon.cli", "serve", str(endless), "--executor", "hash", "--served-name", "tiny"]
        started.append(launch([*command, "--port", str(at), *options], at, "tiny"))
        return started[-1]

    yield begin
    for running in started:
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    tab = browser.page()
    tab.size(1280, 800)
    yield tab
    assert tab.complaints() == []
    tab.close()


def enter(page: Page, server: Running, **settings: str) -> None:
    page.go(server.url)
    page.until(READY)
    for name, value in settings.items():
        page.set(f"[name={name}]", value)


def ask(page: Page, text: str) -> None:
    page.click("#input")
    page.write(text)
    page.press("Enter")


def answered(page: Page) -> str:
    page.until(IDLE)
    return page.text(".message.assistant .text")


def test_a_chat_streams_and_ends(page: Page, serving: Start) -> None:
    enter(page, serving(), max_tokens="2000")
    page.look(
        "window.sizes = []; new MutationObserver(() => sizes.push(document.querySelector('.assistant .text')"
        "?.textContent.length ?? 0)).observe(document.querySelector('#log'), { childList: true, subtree: true }); 0"
    )
    ask(page, "hello")
    assert len(answered(page)) > 500
    sizes = page.look("[...new Set(sizes)]")
    assert len(sizes) > 3
    assert sizes == sorted(sizes)
    assert "2000 tokens" in page.text(".message.assistant .meta")
    assert "cut at max tokens" in page.text(".message.assistant .meta")
    assert page.text("#model") == page.text("#model-name") == "tiny"
    assert page.text("#context") == "32,768 tokens"


def test_an_answer_can_be_stopped(page: Page, serving: Start) -> None:
    enter(page, serving(), max_tokens="30000")
    ask(page, "hello")
    page.until("document.querySelector('.assistant .text').textContent.length > 50")
    page.click("#send")
    answered(page)
    assert "stopped" in page.text(".message.assistant .meta")
    assert page.text("#send") == "Send"


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_tokens_are_tinted_and_tell_what_else_could_have_come(page: Page, serving: Start, mode: str) -> None:
    enter(page, serving(), max_tokens="40", seed="1")
    page.click(f"[value={mode}] + span")
    page.click("#logprobs")
    ask(page, "hello")
    page.until(IDLE)
    assert page.count(".token") == 40
    tints = page.look("[...document.querySelectorAll('.token')].map((it) => getComputedStyle(it).backgroundColor)")
    assert len(set(tints)) > 10
    assert "perplexity" in page.text(".meta")
    page.point(".token")
    assert page.look("document.querySelector('#alternatives').checkVisibility()")
    assert page.count("#alternatives li") >= 5
    assert page.count("#alternatives .taken") == 1
    assert "%" in page.text("#alternatives .taken .share")
    shares = page.look(
        "[...document.querySelectorAll('#alternatives .track i')].map((it) => parseFloat(it.style.width))"
    )
    assert shares == sorted(shares, reverse=True)


def test_tokens_can_be_walked_by_keys(page: Page, serving: Start) -> None:
    enter(page, serving(), max_tokens="20")
    page.click("#logprobs")
    ask(page, "hello")
    page.until(IDLE)
    focused = "[...document.querySelectorAll('.token')].indexOf(document.activeElement)"
    page.look("document.querySelector('.token').focus()")
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 19), ("Home", 0)):
        page.press(key)
        assert page.look(focused) == index
        assert page.look("document.querySelector('[aria-describedby=alternatives]') === document.activeElement")
    page.press("Escape")
    assert not page.look("document.querySelector('#alternatives').checkVisibility()")
    page.click(".meta button[title]")
    assert not page.look("document.querySelector('.tokens').checkVisibility()")
    assert page.look("document.querySelector('.assistant .text').checkVisibility()")


def test_an_answer_outlives_its_engine(page: Page, serving: Start) -> None:
    server = serving()
    enter(page, server, max_tokens="3000", seed="7")
    ask(page, "hello")
    undisturbed = answered(page)
    page.click("#new")
    ask(page, "hello")
    page.until("document.querySelector('.assistant .text')?.textContent.length > 100")
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    assert page.count(".message.busy") == 1
    assert answered(page) == undisturbed
    assert server.metrics()["tenon_engine_restarts_total"] == 1
    assert page.count(".trouble") == 0


def test_the_page_finds_a_server_that_came_again(page: Page, serving: Start) -> None:
    server = serving()
    enter(page, server, max_tokens="30000")
    page.look("window.same = true; 0")
    ask(page, "hello")
    page.until("document.querySelector('.assistant .text')?.textContent.length > 100")
    server.process.kill()
    page.until("document.querySelector('#state').dataset.state === 'offline'")
    page.until(IDLE)
    assert "connection to the server was lost" in page.text(".trouble")
    assert page.look("document.querySelector('#input').disabled")
    serving(port=int(server.url.rpartition(":")[2]))
    page.until(READY)
    page.set("[name=max_tokens]", "20")
    ask(page, "and now?")
    assert answered(page)
    assert page.count(".message.assistant") == 2
    assert "20 tokens" in page.text(".message.assistant .meta")
    assert page.look("window.same")


def test_where_there_are_keys_the_page_asks_for_one(page: Page, serving: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[[key]]\nname = "alice"\nkey = "{KEY}"\nwatch = true\n')
    server = serving("--keys", str(tmp_path / "keys.toml"))
    page.go(server.url)
    page.until("document.activeElement.id === 'key'")
    page.write("not the key, not at all")
    page.press("Enter")
    page.until("document.querySelector('#hint').textContent.includes('not known here')")
    page.until("document.activeElement.id === 'key'")
    page.write(KEY)
    page.press("Enter")
    page.until(READY)
    page.set("[name=max_tokens]", "5")
    ask(page, "hello")
    answered(page)
    assert "5 tokens" in page.text(".meta")


def test_a_schema_that_is_none_is_told_before_it_is_sent(page: Page, serving: Start) -> None:
    enter(page, serving(), format="json_schema", schema='{"type": "object",')
    ask(page, "hello")
    assert "not valid JSON" in page.text("#refusal")
    assert page.text("#refusal") == page.text("#schema-said")
    assert page.look("document.activeElement.id") == "schema"
    assert page.look("document.querySelector('#input').value") == "hello"
    assert page.count(".message") == 0
    page.set("#schema", "[1]")
    assert "must be a JSON object" in page.text("#schema-said")
    page.set("#schema", "{}")
    assert not page.look("document.querySelector('#refusal').checkVisibility()")
    page.set("[name=top_p]", "3")
    page.click("#send")
    assert page.text("#refusal") == "Top p must be a number from 0.001 to 1."
    assert page.look("document.activeElement.id") == "top-p"


def test_what_the_server_refuses_is_told_in_the_chat(page: Page, serving: Start) -> None:
    enter(page, serving(), format="json_schema", schema='{"type": "no type at all"}')
    ask(page, "hello")
    page.until(IDLE)
    assert "response_format" in page.text(".trouble p")
    assert page.look("document.querySelector('#input').value") == "hello"
    page.set("[name=format]", "text")
    page.set("[name=max_tokens]", "5")
    page.click("#send")
    answered(page)
    assert "5 tokens" in page.text(".meta")


def test_settings_reach_the_request_and_are_kept(page: Page, serving: Start) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 3, "max_tokens": 7}
    given |= {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    server = serving()
    enter(page, server, **{name: str(value) for name, value in given.items()}, stop="END\n\\n\\n", format="json_object")
    page.click("#logprobs")
    page.go(server.url)
    page.until(READY)
    page.answer_with("*/v1/chat/completions", "data: [DONE]\n\n")
    ask(page, "hello")
    body = json.loads(page.fulfil()["postData"])
    assert {name: body[name] for name in given} == given
    assert body["stop"] == ["END", "\n\n"]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert body["response_format"] == {"type": "json_object"}
    page.until(IDLE)
    page.click("[type=reset]")
    page.answer_with("*/v1/chat/completions", "data: [DONE]\n\n")
    ask(page, "hello")
    body = json.loads(page.fulfil()["postData"])
    assert body.keys() == {"model", "messages", "temperature", "max_tokens", "stream", "stream_options"}


def test_a_schema_is_sent_as_openai_has_it(page: Page, serving: Start) -> None:
    enter(page, serving(), format="json_schema", schema='{"type": "integer"}')
    page.answer_with("*/v1/chat/completions", "data: [DONE]\n\n")
    ask(page, "hello")
    sent = json.loads(page.fulfil()["postData"])["response_format"]
    schema = {"name": "answer", "schema": {"type": "integer"}, "strict": True}
    assert sent == {"type": "json_schema", "json_schema": schema}


def test_thoughts_are_folded_above_the_answer(page: Page, serving: Start) -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "Two and"}, {"reasoning_content": " two."}]
    deltas += [{"content": "Four"}, {"content": " `4`"}]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    enter(page, serving())
    page.answer_with(
        "*/v1/chat/completions", "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    )
    ask(page, "two and two?")
    page.fulfil()
    assert answered(page) == "Four 4"
    assert page.text(".thinking .thought") == "Two and two."
    assert not page.look("document.querySelector('.thought').checkVisibility()")
    page.click(".thinking summary")
    assert page.look("document.querySelector('.thinking').open")
    assert page.look("document.querySelector('.thinking').nextElementSibling.className") == "text"


def test_trees_of_guesses_are_drawn_and_guessing_can_be_left_off(page: Page, serving: Start) -> None:
    server = serving(*GUESSING)
    enter(page, server, max_tokens="200", seed="3")
    page.until("document.querySelector('#guesses').checkVisibility()")
    for _ in range(2):  # what was said once is guessed
        ask(page, "hello")
        page.until(IDLE)
        page.click("#new")
    page.until("document.querySelectorAll('.tree .node.right').length > 8")
    assert page.count(".tree") <= 12
    assert page.count(".tree .node.next") == page.count(".tree .node.root") == page.count(".tree")
    page.until("document.querySelector('#guesses-text').textContent.includes('% right of')")
    assert "a step" in page.text("#guesses-said")
    said = page.look("[...document.querySelectorAll('.tree')].map((it) => it.getAttribute('aria-label'))")
    assert any("of 8 guesses were right: " in each for each in said)
    depths = page.look("[...document.querySelectorAll('#guesses-depths span')].map((it) => it.title)")
    assert depths[0].startswith("1 token ahead: ")
    assert len(depths) <= 8
    options = "[...document.querySelector('#guesses-of').options].map((it) => it.value)"
    other = page.until(f"{options}.length === 3 && {options}[2]")
    first = page.look("document.querySelector('#guesses-trees').innerHTML")
    page.look(
        f"(() => {{ const it = document.querySelector('#guesses-of'); it.value = {json.dumps(other)}; "
        "it.dispatchEvent(new Event('change')); })()"
    )
    page.until(f"document.querySelector('#guesses-trees').innerHTML !== {json.dumps(first)}")
    page.click("#speculative")
    page.answer_with("*/v1/chat/completions", "data: [DONE]\n\n")
    ask(page, "hello")
    assert json.loads(page.fulfil()["postData"])["speculative"] is False


def test_where_nobody_guesses_there_is_nothing_to_see(page: Page, serving: Start) -> None:
    enter(page, serving(), max_tokens="5")
    ask(page, "hello")
    page.until(IDLE)
    for hidden in ("#guesses", "#speculative-box"):
        assert not page.look(f"document.querySelector('{hidden}').checkVisibility()")


def test_it_fits_every_window_in_both_themes(page: Page, serving: Start) -> None:
    enter(page, serving(*GUESSING), max_tokens="400", format="json_schema")
    ask(page, "x" * 300)
    page.until(IDLE)
    page.set("[name=format]", "text")
    page.click("#logprobs")
    ask(page, "hello")
    page.until(IDLE)
    page.set("[name=format]", "json_schema")
    page.set("#schema", "{" + "y" * 200)
    page.look("document.querySelector('#more').open = true")
    page.click("#send")
    for theme in THEMES:
        page.theme(theme)
        for width in WIDTHS:
            for unfolded in ("false", "true"):
                page.size(width, 900)
                page.look(f"document.querySelector('#side').classList.toggle('open', {unfolded})")
                page.look("document.querySelector('.token:last-child').focus()")
                assert page.look(WIDER) == [], (theme, width, unfolded)
                assert page.look(PALE) == [], (theme, width, unfolded)


@pytest.fixture
def embedded() -> Iterator[Running]:
    """The embedded model on one thread, for the browser wants the other core."""
    port = free_port()
    running = launch(["-m", "tenon.cli", "serve", "--threads", "1", "--port", str(port)], port, "embedded")
    yield running
    running.close()


@pytest.mark.torch
def test_pictures_are_small(page: Page, embedded: Running, tmp_path: Path) -> None:
    folder = Path(os.environ.get("TENON_PICTURES", tmp_path))
    enter(page, embedded, seed="3", temperature="0")
    ask(page, "Hello")  # what is paid once is no part of the picture
    page.until(IDLE)
    page.click("#new")
    ask(page, "Write a function that adds two numbers.")
    assert "return" in answered(page)
    page.click("#logprobs")
    ask(page, "Write a function that reads a JSON file.")
    page.until(IDLE)
    assert "return" in page.text(".tokens")
    page.look("document.activeElement.blur()")
    for name, theme, height in (("page-light", "light", 1080), ("page-dark", "dark", 1080), ("page", "light", 800)):
        page.theme(theme)
        page.size(1280, height)
        page.look("document.querySelector('#side').scrollTop = 0")
        page.point(".token:nth-last-child(9)" if height > 800 else "header")
        picture(page, folder / f"{name}.png")


def picture(page: Page, path: Path) -> None:
    page.look("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.picture(path)
    assert path.stat().st_size < MAX_PICTURE_BYTES
