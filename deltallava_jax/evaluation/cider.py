"""CIDEr of captions without Java: the n-grams that captions share with their references, rare ones weighted more.

The numbers are those of pycocoevalcap's Cider (github.com/salaniz/pycocoevalcap), that is CIDEr-D (Vedantam et al.,
2015), on tokenized text; COCO's tokenizer, in Java, is run by lmms-eval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDERS = 4
SIGMA = 6.0  # of the penalty on a difference in length
SCALE = 10.0


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """A score for each caption against its references, split at whitespace. The mean is the data set's score.

    An n-gram is weighted by the number of images in whose references it occurs, so scores depend on the data set; with
    a single image all weights are zero. Raises ValueError for lists of different lengths and a caption without
    references."""
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} lists of references; each needs one or more")
    reference_ngrams = [[_ngrams(text) for text in texts] for texts in references]
    images = Counter(gram for texts in reference_ngrams for gram in set().union(*texts))

    def weigh(counts: Counter) -> dict:
        total = math.log(len(captions))
        return {gram: count * (total - math.log(max(1, images[gram]))) for gram, count in counts.items()}

    scores = []
    for caption, texts in zip(captions, reference_ngrams, strict=True):
        own = _ngrams(caption)
        alike = [_likeness(own, text, weigh(own), weigh(text)) for text in texts]
        scores.append(SCALE * sum(alike) / len(alike))
    return scores


def _ngrams(text: str) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _likeness(own: Counter, other: Counter, mine: dict, theirs: dict) -> float:
    """The mean over the orders of a cosine that counts no n-gram more often than the reference has it."""
    total = 0.0
    for order in range(1, ORDERS + 1):
        ours, others = ({g: w for g, w in weights.items() if len(g) == order} for weights in (mine, theirs))
        shared = sum(min(weight, others.get(gram, 0.0)) * others.get(gram, 0.0) for gram, weight in ours.items())
        scale = math.hypot(*ours.values()) * math.hypot(*others.values())
        total += shared / scale if scale else 0.0
    difference = _bigrams(own) - _bigrams(other)  # the original measures lengths in bigrams
    return total / ORDERS * math.exp(-(difference**2) / (2 * SIGMA**2))


def _bigrams(counts: Counter) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)
