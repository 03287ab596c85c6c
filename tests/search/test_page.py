from __future__ import annotations

import re
from xml.etree import ElementTree

from fourfold.search.page import render_study
from fourfold.search.space import Choices, SearchSpace
from fourfold.search.study import Refused, best_trials, open_study, records, run_trials

SPACE = SearchSpace({"lora_r": Choices((4, 8, 16)), "pad_token": Choices(("<b>one</b>", "two"))})


def page_of(options, objective, **keys) -> str:
    asked = options(**({"n_trials": 5, "sampler": "random"} | keys))
    study = open_study(asked, SPACE)
    run_trials(study, asked, SPACE, objective)
    return render_study(study, asked.directions, records(study, asked, SPACE), best_trials(study))


def test_its_pictures_are_svg_that_a_parser_takes(options) -> None:
    page = page_of(options, lambda handle, values: {"loss": values["lora_r"] + handle.number})
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(pictures) >= 4
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_what_a_study_holds_is_text_and_no_markup(options) -> None:
    page = page_of(options, lambda handle, values: {"loss": handle.number})
    assert "<b>one" not in page
    assert "&lt;b&gt;one" in page


def test_a_study_of_which_nothing_finished_has_a_page(options) -> None:
    def refused(handle, values):
        raise Refused("no <script>room</script>")

    page = page_of(options, refused)
    assert "5 refused" in page
    assert "<svg" not in page
    assert "<script" not in page
