from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from fourfold.report import Answer, Event, RunRecord, TextSample, render

BEGAN = datetime(2026, 11, 29, 9, 0, tzinfo=UTC)  # as in conftest.py
# The others have to be closed.
VOID = {"meta", "link", "br"}
Make = Callable[..., RunRecord]


class Page(HTMLParser):
    """Its elements as they nest, its text, and what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def said(text: str) -> str:
    return " ".join(" ".join(Page(text).texts).split())


def test_a_whole_page_nests_and_asks_for_nothing(make_record: Make) -> None:
    text = render(make_record())
    page = Page(text)
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "action"}, tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "data:,").startswith(("#", "data:")), tag
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_hostile_text_makes_no_element(make_record: Make) -> None:
    page = Page(render(make_record()))
    assert len(page.named("script")) == 2
    assert page.named("img") == []
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_only_the_own_script_is_allowed_to_run(make_record: Make) -> None:
    text = render(make_record())
    policy = next(m["content"] for m in Page(text).named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert re.findall(r"script-src ([^;]*)", policy)[0].startswith("'sha256-")


def test_tables_have_headers_and_pictures_have_words(make_record: Make) -> None:
    page = Page(render(make_record()))
    assert all(cell.get("scope") in ("row", "col") for cell in page.named("th"))
    assert page.named("table")
    for svg in page.named("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label"))


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": []},
        {"metrics": [{"step": 1, "loss": None, "grad_norm": None}]},
        {"metrics": [{"step": 7, "loss": 2.0}]},
        {"metrics": [{"step": 1, "loss": "much"}, {"step": 2, "loss": 1e308}, {"step": 3, "loss": -1e308}]},
        {"metrics": [{"step": 1, "memory_rest_bytes": None}], "planned": {}, "figures": {}},
        {"events": [], "settings": [], "samples": [], "answers": [], "data_reports": [], "versions": {}, "machine": {}},
        {"events": [Event("something", None, None)]},
    ],
)
def test_a_poor_record_is_a_page_too(make_record: Make, fields: dict[str, object]) -> None:
    text = render(make_record(**fields))
    Page(text)
    assert not re.search(r"\bnan\b|\binf\b|undefined", text[text.index("<body") : text.index("<script>")], re.I)


def test_a_run_of_100000_logs_is_a_page_below_2_mb(make_record: Make) -> None:
    text = render(make_record(count=100_000))
    assert len(text.encode()) < 2_000_000
    assert "step 100,000" in said(text)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (["begin", "end"], "Finished"),
        (["begin", "interrupted"], "Interrupted"),
        (["begin", "out_of_memory"], "Out of memory"),
        (["begin", "failed"], "Failed"),
        (["begin"], "Not ended yet"),
        (["begin", "resume"], "Not ended yet"),
        ([], "No account of its end"),
    ],
)
def test_how_a_run_stands_is_its_last_event(make_record: Make, events: list[str], words: str) -> None:
    assert words in said(render(make_record(events=[Event(name, BEGAN, 3) for name in events])))


def test_the_time_of_a_run_in_parts_leaves_the_pause_out(make_record: Make) -> None:
    # 9:00 to 9:05, and 9:09 to 9:11.
    assert "Time 7 min 0 s in 2 parts" in said(render(make_record()))
    unfinished = make_record(events=[Event("begin", BEGAN, 0)], updated=BEGAN + timedelta(minutes=3), figures={})
    assert "Time 3 min 0 s so far" in said(render(unfinished))


def test_memory_stands_beside_its_plan(make_record: Make) -> None:
    parts = ("weights", "adapters", "optimizer_state", "rest")
    planned = {f"planned_memory_{part}_bytes": 2**30 for part in parts} | {"planned_peak_bytes": 2**32}
    logged = {f"memory_{part}_bytes": 2**30 for part in parts} | {"memory_rest_bytes": 2**29}
    words = said(render(make_record(metrics=[{"step": 1, **logged}], planned=planned, figures={})))
    assert "weights 1.00 GiB 1.00 GiB +0.0%" in words
    assert "worked in 1.00 GiB 0.50 GiB −50.0%" in words
    assert "together 4.00 GiB 3.50 GiB −12.5%" in words


def test_samples_of_a_prompt_stand_together_by_step(make_record: Make) -> None:
    one, two = ({"role": "user", "content": "One?"},), ({"role": "user", "content": "Two?"},)
    samples = [TextSample(step, prompt, f"a{step}", None) for step in (20, 0) for prompt in (one, two)]
    words = said(render(make_record(samples=[*samples, TextSample(20, one, "again", None)])))
    assert words.index("One?") < words.index("step 0 a0") < words.index("step 20 again") < words.index("Two?")
    assert words.count("One?") == 1


def test_many_long_answers_are_counted_and_cut(make_record: Make) -> None:
    prompt = ({"role": "user", "content": "Q"},)
    answers = [Answer(prompt, "yes", "yes" * 5000, index >= 30) for index in range(100)]
    text = render(make_record(answers=answers))
    words = said(text)
    assert "70 of 100 held-out rows were answered rightly. 24 are shown, wrong ones first." in words
    assert (words.count("✗ wrong"), words.count("✓ right")) == (12, 12)
    assert "(13,000 more characters)" in words
    assert len(text) < 400_000


def test_keys_that_differ_from_their_defaults_are_marked(make_record: Make) -> None:
    text = render(make_record())
    assert text.count('class="changed"') == 1
    assert "1 at their defaults" in said(text)
