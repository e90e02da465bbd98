"""Evaluation: what a trained language model is worth, in numbers that others report too.

reader.py      a model with its tokeniser, from a run or a published checkpoint
scoring.py     log-likelihoods of continuations, in batches of like length
perplexity.py  of a text: exact with carried state, or in sliding windows
lengths.py     loss by position: does a model use, or survive, contexts longer than it was trained on?
tasks.py       LAMBADA (last words) and multiple choice
results.py     a JSON file per evaluation
harness.py     the adapter for EleutherAI's lm-evaluation-harness (imported only by those who have it)
"""

from mambakit.evaluation.lengths import length_curve
from mambakit.evaluation.perplexity import Perplexity, exact_perplexity, strided_perplexity
from mambakit.evaluation.reader import Reader, read
from mambakit.evaluation.scoring import Request, Score, encode_pair, score
from mambakit.evaluation.tasks import lambada, multiple_choice

__all__ = [
    "Perplexity",
    "Reader",
    "Request",
    "Score",
    "encode_pair",
    "exact_perplexity",
    "lambada",
    "length_curve",
    "multiple_choice",
    "read",
    "score",
    "strided_perplexity",
]
