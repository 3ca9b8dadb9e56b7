"""Captions: BLEU, ROUGE-L and CIDEr with the COCO challenge's own measures (pycocoevalcap).

The challenge splits captions into words with a Java program; here NLTK's Penn Treebank rules do
it, so that no Java is needed. Scores may differ a little.
"""

from collections.abc import Sequence

from llava_ray.errors import MissingPackageError
from llava_ray.evaluate.summaries import Scored
from llava_ray.types import Question, Score

_PUNCTUATION = frozenset(
    "'' ' `` ` -LRB- -RRB- -LCB- -RCB- ( ) { } [ ] . ? ! , : - -- ... ; \"".split()
)
_REMEDY = "captions need a package that is not installed: pip install 'llava-ray[eval]'"


def score_caption(question: Question, text: str) -> Score:
    """The ROUGE-L of one caption (Lin 2004); CIDEr and BLEU are of all captions together."""
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingPackageError(_REMEDY) from error
    words = tokenize(text)
    value = Rouge().calc_score([words], [tokenize(right) for right in question.answers])
    return Score(float(value), words, f"ROUGE-L with {len(question.answers)} captions")


def summarize_captions(rows: Sequence[Scored]) -> dict[str, float]:
    """CIDEr (Vedantam et al. 2015), BLEU 1 to 4 (Papineni et al. 2002) and ROUGE-L, times 100."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    cider, bleu = CiderScorer(n=4, sigma=6.0), BleuScorer(n=4)
    for row in rows:
        references = [tokenize(right) for right in row.question.answers]
        cider += (row.score.answer, references)
        bleu += (row.score.answer, references)
    numbers = {"CIDEr": 100 * float(cider.compute_score()[0])}
    bleus, _ = bleu.compute_score(option="closest", verbose=0)
    numbers |= {f"Bleu_{n}": 100 * value for n, value in enumerate(bleus, start=1)}
    rouges = [row.score.value for row in rows if row.score.value is not None]
    return numbers | {"ROUGE_L": 100 * sum(rouges) / len(rouges)}


def tokenize(text: str) -> str:
    """Return a caption's words with single spaces between them, in lower case, no punctuation."""
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise MissingPackageError(_REMEDY) from error
    words = NLTKWordTokenizer().tokenize(" ".join(text.split()).lower())
    # the rules split a period off at the end of the text only
    words = [word[:-1] if word.endswith(".") and len(word) > 2 else word for word in words]
    return " ".join(word for word in words if word not in _PUNCTUATION)
