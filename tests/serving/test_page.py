"""The page: what stands in it, and in a real browser that it chats, shows its figures and obeys no answer."""

from __future__ import annotations

import asyncio
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from running import Running, Scripted, running

from fourfold.serving import Served
from fourfold.serving.page import PAGE_HEADERS, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TAKING = "document.title='taken'"
HOSTILE = f'<img src=x onerror="{TAKING}"><script>{TAKING}</script> **a** `b`\n```js\n</pre>\n```\n'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page())
    return parser.found


def test_the_page_is_served_with_a_policy_that_lets_its_own_script_alone_run(tiny_server: Running) -> None:
    response = tiny_server.get("/")
    assert response.text == page()
    policy = response.headers["content-security-policy"]
    assert policy == PAGE_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert [attrs for _, attrs in tags() if attrs.get("src")] == []
    links = [attrs["href"] or "" for _, attrs in tags() if "href" in attrs]
    assert all(link.startswith("data:image/svg+xml,") for link in links)
    assert "@import" not in page()
    assert not re.search(r"url\(", page())


def test_every_field_has_a_label() -> None:
    fields = {attrs["id"] for tag, attrs in tags() if tag in ("input", "textarea") and attrs.get("id")}
    assert fields
    assert fields <= {attrs.get("for") for tag, attrs in tags() if tag == "label"}


def test_no_text_is_read_as_html() -> None:
    script = page().partition("<script>")[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)


def test_a_server_without_the_page_has_none(tiny_served: Served) -> None:
    with running(Served(Scripted(tiny_served.engine), {"m": None}), has_page=False) as server:
        assert server.get("/").status_code == 404


@pytest.fixture(scope="module")
def chat(tiny_served: Served) -> Iterator[Running]:
    """A server that answers in hostile words, asks for a key, and has a page beside the real one that drives itself."""
    engine = Scripted(tiny_served.engine, seconds=0.01)
    engine.words = [HOSTILE, "some ", "more ", "words"]
    with running(Served(engine, {"tuned": "default", "plain": None}), api_keys=("key",)) as server:
        yield server


@pytest.fixture
def drive(chat: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs a script in the page, which ends by `done(value)`, and gives that value."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    paths = {f"/driven/{path}" for path in ("wait", "end", "page")}
    monkeypatch.setattr("fourfold.serving.guard._OPEN", {"/", *paths})

    def run(script: str) -> Any:
        app = chat.uvicorn.config.app
        assert isinstance(app, FastAPI)
        is_done = asyncio.Event()

        # Held back until the script has ended, so that the browser does not take the page for loaded before.
        async def wait() -> dict[str, str]:
            await is_done.wait()
            return {}

        async def end() -> dict[str, str]:
            is_done.set()
            return {}

        async def driven() -> HTMLResponse:
            tail = f"""<img src="/driven/wait" hidden><script>
            const until = (holds) => new Promise((go) => {{
              const look = setInterval(() => {{ if (holds()) {{ clearInterval(look); go(); }} }}, 10);
            }});
            const say = (text) => {{ $("text").value = text; refresh(); ask(); }};
            const done = (value) => {{ document.title = JSON.stringify(value); fetch("/driven/end"); }};
            (async () => {{ {script} }})().catch((error) => done(String(error)));
            </script></body>"""
            text = page().replace("<head>", '<head><base href="/">', 1).replace("</body>", tail)
            return HTMLResponse(text)

        for path, endpoint in (("wait", wait), ("end", end), ("page", driven)):
            app.add_api_route(f"/driven/{path}", endpoint)
        try:
            command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
            command += ["--disable-background-networking", "--timeout=60000"]
            command += [f"--user-data-dir={tmp_path / 'profile'}", f"{chat.url}/driven/page"]
            seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        finally:
            app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in paths]
        title = re.findall(r"<title>(.*?)</title>", seen.stdout, re.S)[0]
        return json.loads(html.unescape(title))

    return run


def test_the_page_chats_shows_its_figures_and_obeys_no_answer(drive: Callable[[str], Any], chat: Running) -> None:
    value = drive(
        """
        await until(() => document.querySelector(".fault"));
        const asked = $("settings").hidden === false && document.activeElement.id === "key";
        $("key").value = "key"; $("key").dispatchEvent(new Event("change"));
        await until(() => !$("model").disabled);
        const models = [...$("model").options].map((option) => option.textContent);
        const faults = document.querySelectorAll(".fault").length;
        $("max_tokens").value = "6"; $("temperature").value = "0.3"; $("system").value = "Be brief.";
        say("<b>Hello</b>");
        await until(() => !live);
        $("model").value = "plain";
        document.querySelector(".foot button:last-child").click();
        await until(() => !live);
        const feet = [...document.querySelectorAll(".foot")].map((foot) => foot.textContent);
        const who = [...document.querySelectorAll(".who")].map((each) => each.textContent);
        const sent = messages.map(({ role }) => role);
        done({ asked, models, faults, feet, who, sent, title: document.title,
          words: document.querySelector(".words").textContent,
          injected: document.querySelectorAll("#turns img, #turns script, #turns b:not(.foot b)").length,
          made: ["strong", "code", "pre"].map((tag) => document.querySelectorAll(`.words ${tag}`).length) });
        """
    )
    assert value["asked"]
    assert value["models"] == ["tuned", "plain (base)"]
    assert value["faults"] == 0
    assert value["title"] == "Fourfold"
    assert value["who"] == ["tuned", "plain"]
    assert value["sent"] == ["user", "assistant"]
    assert value["injected"] == 0
    assert "<img src=x" in value["words"]
    assert min(value["made"]) >= 1
    for foot in value["feet"]:
        assert re.search(r"\d+\.\d tokens/sfirst token \d+\.\d\d s6 tokens.*Copy", foot), foot
    asked = scripted(chat).requests[-1]
    assert asked.sampling.temperature == 0.3
    assert asked.max_new_tokens == 6
    assert asked.adapter is None
    assert "Be brief." in chat.served.engine.tokenizer.decode(asked.prompt_ids)


def test_an_answer_that_is_stopped_frees_its_slot_and_stays(drive: Callable[[str], Any], chat: Running) -> None:
    value = drive(
        """
        $("key").value = "key"; await loadModels();
        $("max_tokens").value = "";
        say("Go on and on");
        await until(() => document.querySelector(".words").textContent.length > 100);
        $("stop").click();
        await until(() => !live);
        done({ kept: messages.at(-1).content.length, foot: document.querySelector(".foot").textContent });
        """
    )
    assert value["kept"] > 100
    assert "stopped" in value["foot"]
    chat.wait_until_idle(seconds=2)


def scripted(server: Running) -> Scripted:
    assert isinstance(server.served.engine, Scripted)
    return server.served.engine
