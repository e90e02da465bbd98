"""Language models as benchmarks use them: read a prompt, write a token, learn.

A `Speaker` is any implementation of a model. All speakers of a comparison have the same weights, so their
logits and losses must agree before anything is timed; what is right is what our model says with the
sequential reference of every operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from mambakit import ops
from mambakit.layers.chunked_loss import summed_cross_entropy
from mambakit.models import LanguageModel
from mambakit.testing.checks import check_same

PROMPT = 24
"""Tokens of the comparison before a model is timed."""
BOUND = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Largest relative difference of logits: rounding of every layer in the weights' type adds up."""

Step = Callable[[Tensor], Tensor]
"""From one token of each row `(b,)` to the next one's logits `(b, v)`, remembering."""


class Speaker(Protocol):
    """A language model."""

    module: nn.Module | None
    """For training, or `None` where there is none."""

    def read(self, tokens: Tensor) -> Tensor:
        """Read prompts `(b, l)` as generation does; logits after the last token `(b, v)`."""

    def decoder(self, batch: int) -> Step:
        """Begin `batch` empty sequences."""

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of labels `(b, l)`."""


class Ours:
    """A language model of this library.

    Args:
        model: The model.
        backend: Forces a backend of the operators; they choose for themselves by default.
    """

    def __init__(self, model: LanguageModel, backend: str | None = None) -> None:
        self.module, self.backend = model, backend

    def read(self, tokens: Tensor) -> Tensor:
        """See `Speaker.read`."""
        with ops.backend(self.backend):
            state = self.module.init_state(len(tokens), max_length=tokens.shape[1])
            return self.module.lm_head(self.module.features(tokens, state)[:, -1])

    def decoder(self, batch: int, prompt: Tensor | None = None) -> Step:
        """See `Speaker.decoder`; with prompts `(b, l)`, begin after them."""
        length = 0 if prompt is None else prompt.shape[1]
        state = self.module.init_state(batch, max_length=length + 256)
        if prompt is not None:
            with torch.no_grad(), ops.backend(self.backend):
                self.module.features(prompt, state)

        def step(token: Tensor) -> Tensor:
            with ops.backend(self.backend):
                return self.module(token[:, None], state)[:, -1]

        return step

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """See `Speaker.loss`."""
        with ops.backend(self.backend):
            features = self.module.features(tokens).flatten(0, 1)
            total, _ = summed_cross_entropy(self.module.lm_head, features, labels.flatten())
            return total / labels.numel()


# ---------------------------------------------------------------------------------------------------------
# The work


def reading(speaker: Speaker, tokens: Tensor) -> Callable[[], Tensor]:
    """One call reads the prompts."""

    def run() -> Tensor:
        with torch.no_grad():
            return speaker.read(tokens)

    return run


def writing(step: Step, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """One call writes the likeliest next token of each row, on and on."""
    token = torch.zeros(batch, dtype=torch.int64, device=device)

    def run() -> Tensor:
        with torch.no_grad():
            return token.copy_(step(token).argmax(-1))

    return run


def learning(speaker: Speaker, tokens: Tensor, labels: Tensor, autocast: bool) -> Callable[[], Tensor]:
    """One call is a training step: loss, gradients, AdamW."""
    device = tokens.device
    optimizer = torch.optim.AdamW(
        speaker.module.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda"
    )
    speaker.module.train()

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = speaker.loss(tokens, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


# ---------------------------------------------------------------------------------------------------------
# Is it right?


def prompt(model: LanguageModel, batch: int = 1) -> Tensor:
    """A few tokens for comparisons."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=generator)
    return drawn.to(model.embedding.weight.device)


def check_reading(name: str, speaker: Speaker, model: LanguageModel, bound: float | None = None) -> float:
    """Compare logits after a prompt; see `checks.check_same` for what is returned and raised.

    Args:
        name: Of the speaker, for the message.
        speaker: With the model's weights.
        model: Ours, which says what is right.
        bound: Largest relative error; by default that of the model's type.
    """
    with torch.no_grad():
        return _check_logits(name, speaker.read(prompt(model)), model, bound)


def check_writing(name: str, speaker: Speaker, model: LanguageModel, bound: float | None = None) -> float:
    """The same, token by token."""
    step = speaker.decoder(1)
    with torch.no_grad():
        for token in prompt(model).unbind(1):
            found = step(token)
        return _check_logits(name, found, model, bound)


def check_learning(name: str, speaker: Speaker, model: LanguageModel) -> float:
    """Compare the loss."""
    tokens = prompt(model)
    with torch.no_grad():
        found, right = (s.loss(tokens, tokens.roll(-1, 1)).float() for s in (speaker, _right(model)))
    return check_same(name, {"loss": found}, {"loss": right}, _bound(model))


def _check_logits(name: str, found: Tensor, model: LanguageModel, bound: float | None) -> float:
    right = _right(model).read(prompt(model)).float()
    return check_same(name, {"logits": found.float()}, {"logits": right}, bound or _bound(model))


def _right(model: LanguageModel) -> Ours:
    """The model with the reference of every operator."""
    return Ours(model, "reference")


def _bound(model: LanguageModel) -> float:
    return BOUND[model.embedding.weight.dtype]
