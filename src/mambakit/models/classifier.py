"""A text classifier: a language model that reads documents to their ends, and a head on what it then knows.

Documents stand end to end in one row and do not see each other, so nothing is computed for padding. The head
reads the features of a document's last token; with `pooling="concat"` those and the document's greatest and
mean features beside them (Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification",
1801.06146, section 3.3), which a short classifier training finds more in.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from mambakit.config import unknown
from mambakit.layers.mixer import Context
from mambakit.models.backbone import Backbone
from mambakit.models.language import LanguageModel, LanguageModelConfig

_POOLINGS = {"last": 1, "mean": 1, "concat": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassifierConfig(LanguageModelConfig):
    """Settings of a text classifier: a language model's, and

    Attributes:
        n_classes: Number of classes.
        pooling: What of a document's features the head reads: of the `last` token, the `mean`, or last,
            greatest and mean together (`concat`).
        head_dropout: Probability that an element of what the head reads is dropped in training.
        token_dropout: Probability that a token is replaced by token 0 in training.
    """

    n_classes: int
    pooling: Literal["last", "mean", "concat"] = "last"
    head_dropout: float = 0.0
    token_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse fewer than two classes, unknown poolings, and what a language model refuses."""
        super().__post_init__()
        if self.n_classes < 2:
            raise ValueError(f"n_classes={self.n_classes}, expected at least 2")
        if self.pooling not in _POOLINGS:
            raise ValueError(unknown("pooling", self.pooling, _POOLINGS))
        for name in ("head_dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected a probability below 1")


class TextClassifier(nn.Module):
    """Class scores of whole documents.

    Args:
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars stay float32.

    Attributes:
        language: The language model that reads; its head is there for those who train both at once.
        head: Features of a document to class scores.
    """

    def __init__(
        self,
        config: TextClassifierConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.language = LanguageModel(config, device=device, dtype=dtype)
        width = _POOLINGS[config.pooling] * config.d_model
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, config.n_classes, device=device, dtype=dtype)

    @property
    def backbone(self) -> Backbone:
        """The blocks of the language model."""
        return self.language.backbone

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Score the classes of each document.

        Args:
            tokens: Documents end to end `(b, t)` with b = 1, integers.
            lengths: Their lengths `(n,)`, integers that add up to `t`.

        Returns:
            Logits `(n, n_classes)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        return self.classify(self.features(tokens, lengths), lengths)

    def features(self, tokens: Tensor, lengths: Tensor, context: Context | None = None) -> Tensor:
        """Features of every token `(1, t, d_model)`; arguments as for `forward`, and

        Args:
            context: Collects what layers want added to the loss; its `seq_idx` is filled in here.
        """
        if tokens.dim() != 2 or tokens.shape[0] != 1:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (1, t): documents end to end")
        if self.training and self.config.token_dropout:
            dropped = torch.rand(tokens.shape, device=tokens.device) < self.config.token_dropout
            tokens = tokens.masked_fill(dropped, 0)
        numbers = torch.arange(len(lengths), device=tokens.device, dtype=torch.int32)
        context = context or Context()
        context.seq_idx = numbers.repeat_interleave(lengths, output_size=tokens.shape[1])[None]
        return self.language.features(tokens, None, context)

    def classify(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Pool features `(1, t, d_model)` over each document and score the classes `(n, n_classes)`."""
        features, pooling = features[0], self.config.pooling
        parts = []
        if pooling != "mean":
            parts.append(features[lengths.cumsum(0) - 1])
        if pooling == "concat":
            parts.append(torch.segment_reduce(features, "max", lengths=lengths, axis=0))
        if pooling != "last":
            parts.append(torch.segment_reduce(features, "mean", lengths=lengths, axis=0))
        return self.head(self.head_dropout(torch.cat(parts, dim=-1)))
