from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from fourfold.evaluation import Sample
from fourfold.inference import Message

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def quickstart(monkeypatch) -> dict[str, object]:
    """The script's names; as a script, it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "quickstart.py"), run_name="quickstart_script")


def test_the_script_runs_from_the_model_to_the_command_that_talks_to_it(
    tiny_llama, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    script = quickstart(monkeypatch)
    script["main"].__globals__["bring_model"] = lambda: tiny_llama  # type: ignore[attr-defined]
    keys = "--device cpu --max_steps 2 --max_length 400 --eval_generate_rows 2 --eval_max_new_tokens 3 --eval_steps 2"
    for _ in range(2):  # a second time over what the first has left
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *keys.split()])
        script["main"]()  # type: ignore[operator]
    said = capsys.readouterr().out
    for part in ("exact match on held-out rows", "MiB in 16 bits", "loss picture", "fourfold chat runs/quickstart"):
        assert part in said.replace("  ", " "), part
    summary = json.loads((tmp_path / "runs" / "quickstart" / "quickstart.json").read_text())
    assert summary["exact_match_before"] == summary["exact_match_after"] == 0
    assert summary["base_bytes_4bit"] < summary["base_bytes_16bit"] * 2
    assert (tmp_path / "runs" / "quickstart-data" / "merged" / "model.safetensors").is_file()


def test_shown_are_the_first_rows_that_training_made_right(monkeypatch, capsys) -> None:
    show = quickstart(monkeypatch)["show_samples"]

    def sample(number: int, answer: str, correct: bool) -> Sample:
        prompt: list[Message] = [{"role": "user", "content": f"note {number}"}]
        return Sample(prompt=prompt, expected="{}", answer=answer, correct=correct)

    before = [sample(number, "no\nidea", number == 0) for number in range(6)]
    after = [sample(number, "{}", number != 1) for number in range(6)]
    show(before, after)  # type: ignore[operator]
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if "note  " in line] == ["2", "3", "4"]
    assert "no idea" in said
