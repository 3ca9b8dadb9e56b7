"""Captions: CIDEr, BLEU and ROUGE-L with the COCO challenge's own measures (pycocoevalcap).

The challenge splits captions into words with a Java program; here NLTK's Penn Treebank rules do
it, so that no Java is needed. Scores may differ a little.
"""

import math
from collections.abc import Sequence

from llava_ray.errors import MissingPackageError
from llava_ray.evaluate.scoring.metrics import Scored
from llava_ray.types import Question, Score

MAX_ORDER = 4
_PUNCTUATION = frozenset(
    "'' ' `` ` -LRB- -RRB- -LCB- -RCB- ( ) { } [ ] . ? ! , : - -- ... ; \"".split()
)


def score_captions(questions: Sequence[Question], texts: Sequence[str]) -> list[Score]:
    """Score captions together: CIDEr weighs each n-gram by how few images it describes.

    Returns:
        for each caption its ROUGE-L (Lin 2004); `figures` are its CIDEr (Vedantam et al. 2015), its
        length, that of the closest reference, and how many n-grams are right and how many there are
        for n from 1 to 4, which is what BLEU (Papineni et al. 2002) is made of.

    Raises:
        MissingPackageError: pycocoevalcap or NLTK is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingPackageError(
            "captions need a package that is not installed: pip install 'llava-ray[eval]'"
        ) from error
    cider, bleu, rouge = CiderScorer(n=MAX_ORDER, sigma=6.0), BleuScorer(n=MAX_ORDER), Rouge()
    rouges, captions = [], [split_words(text) for text in texts]
    for question, caption in zip(questions, captions, strict=True):
        references = [split_words(right) for right in question.answers]
        cider += (caption, references)
        bleu += (caption, references)
        rouges.append(float(rouge.calc_score([caption], references)))
    _, ciders = cider.compute_score()
    return [
        Score(
            rouges[i],
            caption,
            f"ROUGE-L with {len(questions[i].answers)} captions, CIDEr {100 * ciders[i]:.1f}",
            (float(ciders[i]), *_count_ngrams(bleu.ctest[i])),
        )
        for i, caption in enumerate(captions)
    ]


def summarize_captions(rows: Sequence[Scored]) -> dict[str, float]:
    """CIDEr, BLEU 1 to 4 and ROUGE-L, times 100."""
    ciders, lengths, closest, *counts = (
        sum(column) for column in zip(*(row.score.figures for row in rows), strict=True)
    )
    numbers = {"CIDEr": 100 * ciders / len(rows)}
    matched, total = counts[:MAX_ORDER], counts[MAX_ORDER:]
    precision = 1.0
    brevity = math.exp(1 - closest / lengths) if 0 < lengths < closest else 1.0
    for n in range(MAX_ORDER):
        precision *= matched[n] / total[n] if total[n] else 0.0
        numbers[f"Bleu_{n + 1}"] = 100 * brevity * precision ** (1 / (n + 1))
    rouges = [row.score.value or 0.0 for row in rows]
    return numbers | {"ROUGE_L": 100 * sum(rouges) / len(rows)}


def split_words(text: str) -> str:
    """Return a caption's words with single spaces between them, in lower case, no punctuation."""
    from nltk.tokenize import NLTKWordTokenizer

    words = NLTKWordTokenizer().tokenize(" ".join(text.split()).lower())
    # the rules split a period off at the end of the text only
    words = [word[:-1] if word.endswith(".") and len(word) > 2 else word for word in words]
    return " ".join(word for word in words if word not in _PUNCTUATION)


def _count_ngrams(cooked: dict) -> tuple[float, ...]:
    length = cooked["testlen"]
    closest = min((abs(other - length), other) for other in cooked["reflen"])[1]
    return (length, closest, *cooked["correct"], *cooked["guess"])
