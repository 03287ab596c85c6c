"""The page in a real browser: that it draws, runs without an error, asks for nothing, and obeys no text of a run."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fourfold.report import RunRecord, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1200,900",
)
SEEN = re.compile(rb"(?:CONNECT|GET|POST) (?:http://)?([^\s/:]+)")
# What the browser asks for by itself, whatever it shows.
ITS_OWN = re.compile(
    r"(accounts|android\.clients|clients\d?|update|redirector|.*-pa)\.(google|googleapis|gvt1)\.com|www\.google\.com"
)


def title(seen: Visit) -> str:
    return re.findall(r"<title>(.*?)</title>", seen.document, re.S)[0]


@dataclass(frozen=True)
class Visit:
    """What a visit left: the document after its scripts, the console's lines, the hosts asked for."""

    document: str
    console: list[str]
    requests: list[str]


@pytest.fixture
def visit(tmp_path: Path) -> Iterator[Callable[[str], Visit]]:
    """Opens a page in a browser of its own, whose only way to any network is a proxy that takes notes."""
    asked: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def take_notes() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                found = SEEN.search(connection.recv(4096))
                asked.append(found[1].decode() if found else "?")
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=take_notes, daemon=True)
    thread.start()

    def open_page(text: str) -> Visit:
        assert CHROMIUM is not None
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        proxy = f"--proxy-server=127.0.0.1:{server.getsockname()[1]}"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *FLAGS, proxy, profile, "--dump-dom", "--virtual-time-budget=2000", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Visit(done.stdout, console, [host for host in asked if not ITS_OWN.fullmatch(host)])

    yield open_page
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(timeout=10)


def test_a_page_draws_itself_and_asks_for_nothing(
    visit: Callable[[str], Visit], make_record: Callable[..., RunRecord]
) -> None:
    record = make_record()
    seen = visit(render(record))
    assert seen.console == []
    assert seen.requests == []
    assert title(seen) != "taken"
    # Each chart got what its values are read off by: the script ran to its end.
    plots = re.findall(r'<svg [^>]*class="plot"[^>]*>', seen.document)
    assert len(plots) == 10  # five charts, for two widths
    assert all('tabindex="0"' in plot for plot in plots)
    assert re.search(r'<path class="line c1" d="M[\d.]+ [\d.]+L', seen.document)


def test_a_pages_policy_stops_what_would_run_or_ask(
    visit: Callable[[str], Visit], make_record: Callable[..., RunRecord]
) -> None:
    # As if a text had come in unescaped.
    intruder = "<script>document.title = 'taken'</script><img src='http://example.test/x.png'>"
    text = render(make_record(name="run", model="model")).replace("<main>", f"<main>{intruder}", 1)
    seen = visit(text)
    assert title(seen) == "run: model"
    assert seen.requests == []
    assert len(seen.console) == 2
    # And without the policy both would have happened: this test sees what it looks for.
    seen = visit(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    assert title(seen) == "taken"
    assert seen.requests == ["example.test"]


def test_values_are_read_off_by_pointer_and_by_keys(
    visit: Callable[[str], Visit], make_record: Callable[..., RunRecord]
) -> None:
    script = """<script>
    const plot = document.querySelector(".plot"), tip = plot.parentElement.querySelector(".tip");
    const box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top + 50}));
    const pointed = tip.innerText;
    plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
    document.title = JSON.stringify([pointed, tip.innerText]);
    </script></body>"""
    text = render(make_record(name="run", model="model")).replace("</body>", script)
    seen = visit(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    assert seen.console == []
    pointed, moved = title(seen).split('","')
    assert "step 40\\ntraining: 1.037\\nvalidation: 1.137" in pointed
    assert "step 39\\ntraining: 1.04" in moved
