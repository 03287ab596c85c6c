from __future__ import annotations

import io
import json
from pathlib import Path

import tiny

from fourfold.training.out_of_memory import part_key, with_rest
from fourfold.training.progress import ProgressCallback, ProgressStyle, choose_style, figures


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(tmp_path: Path, style: ProgressStyle, stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    tiny.trainer(
        tmp_path,
        eval_dataset=tiny.rows(4),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
        callbacks=(ProgressCallback(style, stream),),
    ).train()
    return stream.getvalue()


def test_plain_style_tells_each_log_in_one_line_without_control_codes(tmp_path: Path, capfd) -> None:
    lines = told(tmp_path, ProgressStyle.PLAIN).splitlines()
    assert len(lines) == 6
    assert all(part in lines[0] for part in ("step 1/4", "loss ", "tok/s", "GiB", "left"))
    assert lines[2].startswith("step 2/4  validation loss ")
    assert "\x1b" not in "".join(lines)
    assert capfd.readouterr().out == ""


def test_json_style_prints_one_object_a_line(tmp_path: Path) -> None:
    events = [json.loads(line) for line in told(tmp_path, ProgressStyle.JSON).splitlines()]
    assert events[0]["event"] == "log"
    assert {"step", "max_steps", "loss", "tokens_per_second", "memory_peak_bytes"} <= events[0].keys()
    assert {"event": "save", "step": 4} in events


def test_live_style_shows_figures_and_gives_the_cursor_back(tmp_path: Path) -> None:
    said = told(tmp_path, ProgressStyle.LIVE, Terminal())
    assert "4/4" in said
    assert "step 4: validation loss" in said
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h")


def test_silent_style_says_nothing(tmp_path: Path, capfd) -> None:
    assert told(tmp_path, ProgressStyle.SILENT) == ""
    assert capfd.readouterr().out == ""


def test_style_follows_the_stream() -> None:
    assert choose_style(Terminal()) is ProgressStyle.LIVE
    assert choose_style(io.StringIO()) is ProgressStyle.PLAIN
    assert choose_style(Terminal(), json=True) is ProgressStyle.JSON


def test_a_line_tells_what_weights_take_of_the_memory_where_that_is_known() -> None:
    gib = 2**30
    parts = with_rest({"weights": 5 * gib, "adapters": gib, "optimizer state": gib}, 10 * gib)
    record = {"loss": 1.5, "memory_peak_bytes": 10 * gib, **{part_key(part): size for part, size in parts.items()}}
    assert figures(record) == "loss 1.5000  10.00 GiB (weights 5.00, rest 3.00)"
    assert set(record) >= {"memory_adapters_bytes", "memory_optimizer_state_bytes", "memory_rest_bytes"}
    assert figures({"memory_peak_bytes": gib}) == "1.00 GiB"
