from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.text_metrics import TEXT_METRICS, text_figures

REFERENCES = [
    "Anna paid 6 euros to the baker on Monday.",
    "The contract with Nordwind ends in March 2024, and no one renewed it.",
    "Yes.",
    "Paris is the capital of France.",
]
ANSWERS = [
    "Anna paid six euros to the baker on Monday morning.",
    "The contract with Nordwind was renewed in March 2024.",
    "",
    "Paris is the capital of France.",
]


def values(names: list[str], references: list[str] = REFERENCES, answers: list[str] = ANSWERS) -> dict[str, float]:
    return {figure.name: figure.value for figure in text_figures(names, references, answers)}


def test_the_figures_are_the_libraries_own() -> None:
    found = values(list(TEXT_METRICS))
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(reference, answer) for reference, answer in zip(REFERENCES, ANSWERS, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(np.mean([row[name].fmeasure for row in rows]))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_corpus_of_drawn_rows_has_the_librarys_figure_of_that_corpus(name: str) -> None:
    (figure,) = text_figures([name], REFERENCES, ANSWERS)
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    drawn = [[0, 1, 2, 3], [0, 0, 1, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 2, 0]]
    sums = np.stack([figure.parts[rows].sum(0) for rows in drawn])
    wanted = [theirs([ANSWERS[row] for row in rows], [[REFERENCES[row] for row in rows]]).score for rows in drawn]
    assert figure.combine(sums) == pytest.approx(wanted)


def test_what_rouge_cannot_read_and_what_is_not_installed_is_told(monkeypatch) -> None:
    with pytest.raises(DataError, match=r"row 2: the reference has no word(.|\n)*支付(.|\n)*chrf"):
        values(["rouge"], ["Paid.", "我们支付了"], ["Paid.", "我们支付了"])
    assert values(["chrf"], ["我们支付了"], ["我们支付了"]) == {"chrf": pytest.approx(100)}
    with pytest.raises(ConfigError, match=r"meteor(.|\n)*rouge, bleu, chrf"):
        values(["meteor"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bleu is computed by sacrebleu(.|\n)*fourfold\[metrics\]"):
        values(["bleu"])
