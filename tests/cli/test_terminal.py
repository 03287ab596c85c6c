from __future__ import annotations

import json
import logging
import sys
import warnings

import pytest

from fourfold.cli.terminal import print_json, print_result, progress_style, set_up_logging


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("fourfold", "py.warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize("verbose", [False, True])
def test_our_messages_are_shown_and_those_of_others_only_when_asked(restored_logging, capsys, verbose):
    set_up_logging(verbose)
    logging.getLogger("fourfold.data").info("3 rows dropped")
    logging.getLogger("accelerate").warning("chatter")
    logging.getLogger("accelerate").error("trouble")
    warnings.warn("python's chatter", UserWarning, stacklevel=1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3 rows dropped" in shown.err
    assert "trouble" in shown.err
    assert ("chatter" in shown.err) is verbose
    assert ("python's chatter" in shown.err) is verbose


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    print_json({"a": float("nan"), "b": [float("inf")], "c": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None], "c": 1.5}


def test_a_table_shows_bytes_as_mebibytes_and_nested_fields_with_their_path(capsys):
    print_result({"peak_bytes": 3 * 2**20, "eval": {"loss": 0.123456789, "done": True}}, as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["peak_bytes", "3.0", "MiB"], ["eval.loss", "0.123457"], ["eval.done", "yes"]]


def test_progress_is_plain_where_nobody_watches(monkeypatch):
    assert progress_style(as_json=True) == "json"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert progress_style(as_json=False) == "plain"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert progress_style(as_json=False) == "terminal"
