"""Our models under EleutherAI's lm-evaluation-harness, as `--model mambakit`.

    pip install 'mambakit[lm-eval]'
    python -m mambakit.evaluation --model mambakit \\
        --model_args path=state-spaces/mamba-130m-hf --tasks lambada_openai,hellaswag

Importing this module registers the name; the package run as a program is `lm_eval` with it. In Python:
`lm_eval.simple_evaluate(model=MambakitLM("runs/novels"), tasks=[...])`.

Rolling log-likelihoods (WikiText's word perplexity) are exact by default: the state is carried through the
whole document. With `max_length` they are taken in windows, as the harness takes those of other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mambakit.config import ConfigError, unknown
from mambakit.evaluation.perplexity import exact_perplexity
from mambakit.evaluation.reader import Reader, read
from mambakit.evaluation.scoring import TOKENS, Request, score
from mambakit.generation import Sampling, stream_text

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"the harness needs: pip install 'mambakit[lm-eval]' ({error})") from None

run = cli_evaluate
"""The harness's own command line."""
_NEW_TOKENS = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_model("mambakit")
class MambakitLM(TemplateLM):
    """A language model of ours, as the harness sees it.

    Args:
        path: A run folder, a checkpoint folder, a repository of the hub; or a `Reader` made in Python.
        dtype: `float32`, `bfloat16` or `float16`; as stored by default.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        max_length: Tokens of a window of log-likelihoods: rolling ones are taken in such windows, and longer
            contexts are cut on the left. None by default, because a recurrent model needs none.
        batch_tokens: Most tokens read at once.
        batch_size: Accepted, as the harness passes one; batches are made by tokens.

    Raises:
        ConfigError: Nothing of this name, or a model without a tokeniser or an end token.
    """

    def __init__(
        self,
        path: str | Reader,
        dtype: str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(unknown("dtype", dtype, _DTYPES))
        wanted = None if dtype is None else _DTYPES[dtype]
        self.reader = path if isinstance(path, Reader) else read(path, dtype=wanted, device=device or "auto")
        if self.reader.end is None:
            raise ConfigError(f"{self.reader.name}: the harness needs a token that ends a text")
        self.max_length = None if max_length is None else int(max_length)
        self.batch_tokens = int(batch_tokens)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.reader.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and stands before the first."""
        return self.reader.end

    @property
    def tokenizer_name(self) -> str:
        """The model's name, under which the harness caches requests."""
        return self.reader.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; none is added."""
        return [int(token) for token in self.reader.tokenizer.encode(string)]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""
        return self.reader.tokenizer.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Judge continuations; answers are kept in the harness's cache."""
        pairs = [Request(self._kept(context, len(rest)), rest) for _, context, rest in requests]
        scores = score(self.reader.model, pairs, tokens=self.batch_tokens)
        results = [(one.log_likelihood, one.is_greedy) for one in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _kept(self, context: list[int], following: int) -> list[int]:
        """The end of a context that still fits a window with what follows."""
        return context if self.max_length is None else context[-max(1, self.max_length + 1 - following) :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each judged from its beginning."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            found.append(self._rolling(ids) if ids else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def _rolling(self, ids: list[int]) -> float:
        if self.max_length is None:
            return -exact_perplexity(self.reader.model, torch.tensor([self.reader.end, *ids])).nats
        windows = get_rolling_token_windows(ids, self.reader.end, self.max_length, context_len=1)
        pairs = [Request(*make_disjoint_window(window)) for window in windows]
        scores = score(self.reader.model, pairs, tokens=self.batch_tokens)
        return sum(one.log_likelihood for one in scores)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, greedily unless asked to sample."""
        found = []
        for context, given in (request.args for request in requests):
            settings = dict(given)
            until = settings.pop("until", None) or []
            pieces = stream_text(
                self.reader.model,
                self.reader.tokenizer,
                context,
                max_tokens=int(settings.pop("max_gen_toks", _NEW_TOKENS)),
                sampling=_sampling(settings),
                stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
                stop_tokens=[self.reader.end],
            )
            found.append("".join(pieces))
            self.cache_hook.add_partial("generate_until", (context, given), found[-1])
        return found


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How to choose tokens, from the harness's names."""
    if not settings.get("do_sample"):
        return Sampling(temperature=0.0)
    given = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
    return Sampling(**given)
