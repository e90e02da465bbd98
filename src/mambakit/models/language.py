"""A language model: embedding, backbone, and a head that scores the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.layers.mixer import Context, State
from mambakit.models.backbone import Backbone, BackboneConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(BackboneConfig):
    """Settings of a language model: a backbone's, and

    Attributes:
        vocab_size: Number of tokens.
        tie_embeddings: Use the embedding as the head's weight.
        initializer_range: Standard deviation of the initial embedding.
        embedding_scale: Factor on the embedding.
        logits_scale: Factor on the logits.
    """

    vocab_size: int
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    embedding_scale: float = 1.0
    logits_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an empty vocabulary, and what a backbone refuses."""
        super().__post_init__()
        if self.vocab_size <= 0:
            raise ValueError(f"vocab_size={self.vocab_size}, expected a positive number")


class LanguageModel(nn.Module):
    """Token scores for the next position, from any backbone.

    Args:
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars stay float32.

    Attributes:
        published: What the `config.json` said that the model was loaded from, if it was.
    """

    published: Mapping[str, Any] | None = None

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, **made)
        self.backbone = Backbone(config, **made)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, **made)
        nn.init.normal_(self.embedding.weight, std=config.initializer_range)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Score the next token after every position.

        Args:
            tokens: Token numbers `(b, l)`, integers.
            state: Where the sequences stand, from `init_state`; overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            Logits `(b, l, v)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        return self.lm_head(self.features(tokens, state, context))

    def features(self, tokens: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Activations `(b, l, d_model)` below the head; arguments as for `forward`.

        With `lm_head` applied to chosen positions only, long prompts need no `(b, l, v)` logits.
        """
        scale, x = self.config.embedding_scale, self.embedding(tokens)
        x = self.backbone(x if scale == 1 else scale * x, state, context)
        scale = self.config.logits_scale  # taken here, so that the head stays a plain matrix
        return x if scale == 1 else scale * x

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state for `batch` sequences; arguments as for `Mixer.init_state`."""
        return self.backbone.init_state(batch, max_length=max_length, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise everything anew."""
        nn.init.normal_(self.embedding.weight, std=self.config.initializer_range)
        self.backbone.reset_parameters()
        if not self.config.tie_embeddings:
            self.lm_head.reset_parameters()
