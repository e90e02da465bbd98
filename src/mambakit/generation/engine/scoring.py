"""A language model as the decode engine computes it, in a form that a task can score.

Evaluations read whole sequences by the model's forward; what an engine with rounded weights says of the same
text can only be known by letting it read that text token by token. This is how the accuracy of its forms is
measured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.generation.engine.engine import DecodeEngine
from mambakit.generation.engine.program import MOST_BATCH
from mambakit.layers.mixer import Context, State
from mambakit.models.language import LanguageModel


class DecodedModel(nn.Module):
    """Reads with an engine, one token at a time; otherwise a language model without gradients.

    Its features are the engine's logits, and its head passes them on, so logits of all positions exist at
    once: evaluate large vocabularies in small batches.

    Args:
        model: The model that the engine was made of.
        engine: Its engine.

    Attributes:
        config: The model's.
    """

    def __init__(self, model: LanguageModel, engine: DecodeEngine) -> None:
        super().__init__()
        self.model, self.engine, self.config = model, engine, model.config
        self.lm_head = nn.Identity()

    def features(self, tokens: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Logits after every token.

        Args:
            tokens: Token numbers `(b, l)`, integers.
            state: Where the sequences stand, for up to 16 of them; overwritten in place. `None` begins empty
                ones, of any number.
            context: Documents of the tokens; each begins with an empty state.

        Returns:
            Logits `(b, l, v)`, float32.
        """
        logits = torch.empty(*tokens.shape, self.config.vocab_size)
        documents = None if context is None else context.seq_idx
        for first in range(0, len(tokens), MOST_BATCH if state is None else len(tokens)):
            rows = slice(first, first + MOST_BATCH if state is None else None)
            own = self.model.init_state(len(tokens[rows])) if state is None else state
            self._read(tokens[rows], own, None if documents is None else documents[rows], logits[rows])
        return logits

    def forward(self, tokens: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """The same as `features`, as for `LanguageModel.forward`."""
        return self.features(tokens, state, context)

    def init_state(self, batch: int, *, max_length: int | None = None) -> State:
        """Make an empty state; arguments as for `LanguageModel.init_state`."""
        return self.model.init_state(batch, max_length=max_length)

    def _read(self, tokens: Tensor, state: State, documents: Tensor | None, logits: Tensor) -> None:
        for t in range(tokens.shape[1]):
            if documents is not None and t > 0:
                begun = (documents[:, t] != documents[:, t - 1]).nonzero().squeeze(1)
                if len(begun):
                    state.reset(begun)
            logits[:, t] = self.engine.step(tokens[:, t], state)
