"""A mixture of experts as a mixer: the `E` of patterns such as `"M-ME*-ME"`.

A router scores the experts for every token and the best `top_k` of them run; no token is dropped, whatever
the load. Tokens are sorted by expert, so that each expert is two matrix products over its own rows.

    x -> router -> scores -> choose k -> weights --------*--> sum over k --(+)--> y
    |-> rows sorted by expert -> in_proj, gate, out_proj-'                  |
    '-> shared MLP (optional) ----------------------------------------------'

Published models differ in five choices, which are settings here: the score (softmax or sigmoid), whether the
chosen weights are divided by their sum, a factor, a shared MLP, and how the load is kept even: by a loss, by
Sinkhorn's iteration in training (BlackMamba), or by a bias on the choice that is no part of the weights
(Nemotron-H).

Source: Shazeer et al. (1701.06538); Fedus et al., "Switch transformers" (2101.03961), equations 4 to 6; Clark
et al., "Unified scaling laws for routed language models" (2202.01169), appendix B, for Sinkhorn; Wang et al.
(2408.15664), algorithm 1, for the bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.config import unknown
from mambakit.layers.init import check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State
from mambakit.layers.mlp import ACTIVATIONS, GatedMLPConfig, MLPConfig

BALANCES = ("loss", "sinkhorn", "bias", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(MixerConfig, tag="moe"):
    """Settings of a mixture of experts.

    Attributes:
        n_experts: Experts.
        top_k: Experts that see a token.
        d_hidden: Hidden channels of an expert.
        activation: `silu`, `gelu` or `relu2`.
        gated: Whether an expert multiplies by an activated gate, or activates its hidden channels themselves.
        score: `softmax` over the experts, or a `sigmoid` of each.
        normalise: Divide the chosen weights by their sum.
        weight_scale: Factor on the weights.
        router_bias: Whether the router has a bias.
        balance: `loss`, `sinkhorn`, `bias` or `none`: what keeps the load even in training.
        balance_loss: Factor of the loss.
        balance_rate: Change of the bias per step.
        d_shared: Hidden channels of an MLP, gated like the experts, that sees every token; none by default.
        d_latent: Channels that the experts see and give, projected from and to the model's; all by default.
        n_groups: Groups of neighbouring experts; a token's experts come from its best groups.
        top_groups: How many groups those are.
    """

    n_experts: int = 8
    top_k: int = 2
    d_hidden: int = 1024
    activation: str = "silu"
    gated: bool = True
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    weight_scale: float = 1.0
    router_bias: bool = False
    balance: Literal["loss", "sinkhorn", "bias", "none"] = "loss"
    balance_loss: float = 0.001
    balance_rate: float = 0.001
    d_shared: int | None = None
    d_latent: int | None = None
    n_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes and choices that do not exist."""
        check_positive(n_experts=self.n_experts, top_k=self.top_k, d_hidden=self.d_hidden)
        for name in ("d_shared", "d_latent"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if self.n_experts % self.n_groups or not 1 <= self.top_groups <= self.n_groups:
            raise ValueError(
                f"n_groups={self.n_groups}, top_groups={self.top_groups}: expected a divisor of "
                f"n_experts={self.n_experts}, and from 1 to as many"
            )
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k}, expected at most n_experts={self.n_experts}")
        if self.balance == "sinkhorn" and self.top_k != 1:
            raise ValueError(f"top_k={self.top_k}, expected 1 with balance='sinkhorn'")
        for name, valid in (
            ("activation", ACTIVATIONS),
            ("score", ("softmax", "sigmoid")),
            ("balance", BALANCES),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(unknown(name, getattr(self, name), valid))


class ExpertLinear(nn.Module):
    """A linear map for each expert: `y_t = weight[e_t] x_t`, tokens sorted by expert.

    Args:
        n_experts: Experts `e`.
        d_in: Channels in.
        d_out: Channels out.
        device: Where the weight lives.
        dtype: Its type.
    """

    def __init__(
        self,
        n_experts: int,
        d_in: int,
        d_out: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows; a batch `(b, l, d)` is taken apart by `MoE`.

        Args:
            x: Tokens `(t, d_in)`, those of expert 0 first.
            counts: How many tokens each expert has `(e,)`, integers.

        Returns:
            Tokens `(t, d_out)`.
        """
        weight, kind = self.weight, x.device.type
        if torch.is_autocast_enabled(kind):
            x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
        aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
        if kind == "cuda" and aligned and x.dtype in (torch.bfloat16, torch.float16):
            return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
        pieces = x.split(counts.tolist())
        return torch.cat([F.linear(piece, one) for piece, one in zip(pieces, weight, strict=True)])

    def reset_parameters(self) -> None:
        """Draw every expert as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        experts, d_out, d_in = self.weight.shape
        return f"{experts} experts, {d_in} -> {d_out}"


class MoE(Mixer, config=MoEConfig):
    """A mixture of experts.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        config: MoEConfig = MoEConfig(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        experts, hidden = config.n_experts, config.d_hidden
        self.router = nn.Linear(d_model, experts, bias=config.router_bias, **made)
        if config.balance == "bias":
            self.register_buffer("choice_bias", torch.zeros(experts, device=device, dtype=torch.float32))
        width = d_model if config.d_latent is None else config.d_latent
        self.to_latent = self.from_latent = None
        if config.d_latent is not None:
            self.to_latent = nn.Linear(d_model, width, bias=False, **made)
            self.from_latent = nn.Linear(width, d_model, bias=False, **made)
        self.in_proj = ExpertLinear(experts, width, (2 if config.gated else 1) * hidden, **made)
        self.out_proj = ExpertLinear(experts, hidden, width, **made)
        self.shared = None
        if config.d_shared is not None:
            kind = GatedMLPConfig if config.gated else MLPConfig
            shared = kind(d_hidden=config.d_shared, activation=config.activation)
            self.shared = shared.build(d_model, **made)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Transform every token by the experts that it is routed to.

        Args:
            x: Activations `(b, l, d_model)`.
            state: Empty.
            context: In training, its `losses` receive the balance loss.

        Returns:
            Activations `(b, l, d_model)`.
        """
        rows = x.flatten(0, -2)  # (t, d)
        weights, chosen = self.route(rows, context)  # (t, k) each
        order = chosen.flatten().argsort(stable=True)  # of (t k) visits, those of expert 0 first
        counts = torch.bincount(chosen.flatten(), minlength=self.config.n_experts)
        seen = rows if self.to_latent is None else self.to_latent(rows)
        hidden = self.in_proj(seen[order // self.config.top_k], counts)
        y = self.out_proj(self._activate(hidden), counts)  # (t k, d), sorted by expert
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = y[back].unflatten(0, (-1, self.config.top_k))  # (t, k, d)
        y = (weights.to(y.dtype).unsqueeze(-1) * y).sum(1)
        y = (y if self.from_latent is None else self.from_latent(y)).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def route(self, rows: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Scores are taken in float32 at least.

        Args:
            rows: Tokens `(t, d)`.
            context: In training, its `losses` receive the balance loss.

        Returns:
            Weights `(t, k)`, and the chosen experts `(t, k)`, the best first.
        """
        config, wide = self.config, torch.promote_types(rows.dtype, torch.float32)
        bias = None if self.router.bias is None else self.router.bias.to(wide)
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(wide), self.router.weight.to(wide), bias)
            scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
            preferred = scores
            if config.balance == "bias":
                preferred = scores + self.choice_bias
            elif config.balance == "sinkhorn" and self.training:
                preferred = sinkhorn(logits.detach())
            if config.n_groups > 1:
                preferred = _within_best_groups(preferred, config.n_groups, config.top_groups)
            chosen = preferred.topk(config.top_k, dim=-1).indices
            weights = scores.gather(-1, chosen)
            if config.normalise:
                weights = weights / weights.sum(-1, keepdim=True)
        if self.training and config.balance == "bias":
            self._even_out(chosen)
        if self.training and config.balance == "loss" and context is not None:
            context.losses.append(config.balance_loss * balance_loss(scores, chosen))
        return weights * config.weight_scale, chosen

    def last_weights(self) -> Iterator[nn.Parameter]:
        """The weights that write to the residual stream."""
        yield (self.out_proj if self.from_latent is None else self.from_latent).weight
        if self.shared is not None:
            yield self.shared.out_proj.weight

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases on the choice start at zero."""
        for part in self.children():
            part.reset_parameters()
        if self.config.balance == "bias":
            nn.init.zeros_(self.choice_bias)

    @torch.no_grad()
    def _even_out(self, chosen: Tensor) -> None:
        """Make experts with less than their share of the tokens more likely to be chosen, the others less."""
        load = torch.bincount(chosen.flatten(), minlength=self.config.n_experts)
        self.choice_bias += self.config.balance_rate * (load.float().mean() - load).sign()

    def _activate(self, hidden: Tensor) -> Tensor:
        act = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return act(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * act(gate)


def _within_best_groups(scores: Tensor, n_groups: int, top_groups: int) -> Tensor:
    """Scores `(t, e)` with those outside a token's best groups at minus infinity.

    A group is as good as its two best experts together (DeepSeek-AI, 2412.19437, section 2.1.2).
    """
    groups = scores.unflatten(-1, (n_groups, -1))  # (t, n, e / n)
    best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """`e sum_i f_i P_i`: 1 where the load is even, `e` where one expert gets all.

    Args:
        scores: Probabilities `(t, e)`.
        chosen: Experts of each token `(t, k)`.

    Returns:
        A scalar; its gradient lowers the probability `P_i` of experts with a large share `f_i` of the tokens.

    Source:
        Fedus et al. (2101.03961), equation 4, with shares of `k` visits instead of one.
    """
    experts = scores.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (share * scores.mean(0)).sum()


def sinkhorn(logits: Tensor, sharpness: float = 2.0, steps: int = 30) -> Tensor:
    """Scores under which every expert is preferred by about as many tokens as any other.

    Rows and columns of `exp(sharpness logits)` are scaled in turn until their sums are `1 / t` and `1 / e`.

    Args:
        logits: `(t, e)`.
        sharpness: Factor on the logits.
        steps: Turns.

    Returns:
        The scaled matrix `(t, e)`; its largest entry in a row names the token's expert.

    Source:
        Clark et al. (2202.01169), appendix B.
    """
    tokens, experts = logits.shape
    rows, columns = logits.new_zeros(tokens, 1), logits.new_zeros(1, experts)
    sharp = sharpness * logits
    for _ in range(steps):
        rows = -torch.logsumexp(sharp + columns, dim=1, keepdim=True) - math.log(tokens)
        columns = -torch.logsumexp(sharp + rows, dim=0, keepdim=True) - math.log(experts)
    return (sharp + rows + columns).exp()
