"""A sequence classifier: encode every step, pool over time, score the classes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from mambakit.layers.mixer import Context
from mambakit.models.backbone import Backbone, BackboneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifierConfig(BackboneConfig):
    """Settings of a sequence classifier: a backbone's, and

    Attributes:
        n_classes: Number of classes.
        vocab_size: Number of tokens, where the input is tokens.
        in_features: Features per step, where the input is real vectors.
        pooling: Classify the mean over time or the last step.
    """

    n_classes: int
    vocab_size: int | None = None
    in_features: int | None = None
    pooling: Literal["mean", "last"] = "mean"

    def __post_init__(self) -> None:
        """Refuse inputs that are neither tokens nor vectors, and what a backbone refuses."""
        super().__post_init__()
        if (self.vocab_size is None) == (self.in_features is None):
            raise ValueError(
                f"vocab_size={self.vocab_size} and in_features={self.in_features}, "
                "expected exactly one of the two"
            )
        if self.n_classes < 2:
            raise ValueError(f"n_classes={self.n_classes}, expected at least 2")


class SequenceClassifier(nn.Module):
    """Class scores for whole sequences, from any backbone.

    Args:
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars stay float32.
    """

    def __init__(
        self,
        config: SequenceClassifierConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        if config.vocab_size is not None:
            self.encoder: nn.Module = nn.Embedding(config.vocab_size, config.d_model, **made)
        else:
            self.encoder = nn.Linear(config.in_features, config.d_model, **made)
        self.backbone = Backbone(config, **made)
        self.head = nn.Linear(config.d_model, config.n_classes, **made)

    def forward(self, inputs: Tensor, context: Context | None = None) -> Tensor:
        """Score the classes of each sequence.

        Args:
            inputs: Tokens `(b, l)`, integers, or vectors `(b, l, in_features)`.
            context: Positions of the steps.

        Returns:
            Logits `(b, n_classes)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        features = self.backbone(self.encoder(inputs), None, context)  # (b, l, d_model)
        pooled = features.mean(1) if self.config.pooling == "mean" else features[:, -1]
        return self.head(pooled)
