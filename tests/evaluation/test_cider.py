"""CIDEr against pycocoevalcap's numbers."""

import json
from pathlib import Path

import pytest

from deltallava_jax.evaluation.cider import cider

GOLDEN = json.loads((Path(__file__).parent.parent / "testdata" / "cider.json").read_text())
ITEMS = GOLDEN["items"]


def test_the_scores_of_tokenized_captions():
    scores = cider([i["tokenized_prediction"] for i in ITEMS], [i["tokenized_references"] for i in ITEMS])
    assert scores == pytest.approx([item["cider"] for item in ITEMS], rel=1e-9, abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(GOLDEN["aggregate"]["CIDEr"], rel=1e-9)


def test_the_scores_of_raw_captions_in_lower_case():
    lower = lambda texts: [text.lower() for text in texts]
    scores = cider(lower([i["prediction"] for i in ITEMS]), [lower(i["references"]) for i in ITEMS])
    assert scores == pytest.approx(GOLDEN["whitespace_only_variant"]["per_item"], rel=1e-9, abs=1e-12)


def test_what_cannot_be_scored():
    assert cider(["", "a dog"], [["a cat"], ["a dog"]])[0] == 0
    with pytest.raises(ValueError, match="1 captions and 2 lists"):
        cider(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="each needs one or more"):
        cider(["a", "b"], [["a"], []])
