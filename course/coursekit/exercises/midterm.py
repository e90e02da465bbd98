"""Checks of the midterm's own tasks; the others are drawn from the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mambakit
from coursekit.exercises import Exercise

# ---------------------------------------------------------------------------------------------------------
# What is in the box: causality, linearity, time invariance (module 1), rank (module 2)

box = Exercise("midterm-box", "examine", "What is in the box?", stars=3, minutes=45, graded=True)

LENGTH = 20
Layer = Callable[[Tensor], Tensor]


def _scan(decays: Tensor, weights: Tensor) -> Layer:
    """A system with decays `(l, n)` or `(n,)`, read with `weights`."""

    def layer(x: Tensor) -> Tensor:
        h, out = torch.zeros_like(weights), []
        for t in range(len(x)):
            h = (decays[t] if decays.dim() == 2 else decays) * h + x[t]
            out.append(weights @ h)
        return torch.stack(out)

    return layer


def _invariant(rng: torch.Generator, n: int) -> Layer:
    modes = torch.linspace(0.9, -0.7, n, dtype=torch.float64)
    return _scan(modes, torch.rand(n, generator=rng, dtype=torch.float64) + 0.5)


def _varying(rng: torch.Generator, n: int, begin: int = 0) -> Layer:
    """Decays of their own for every position from `begin` on."""
    decays = 0.4 + 0.55 * torch.rand(LENGTH, n, generator=rng, dtype=torch.float64)
    decays[:begin] = decays[0]
    return _scan(decays, torch.rand(n, generator=rng, dtype=torch.float64) + 0.5)


def _selective(x: Tensor) -> Tensor:
    h, out = torch.zeros((), dtype=x.dtype), []
    for token in x:
        gate = torch.sigmoid(2 * token)
        h = gate * h + (1 - gate) * token
        out.append(h)
    return torch.stack(out)


def _homogeneous(x: Tensor) -> Tensor:
    """Scales with its input, and yet the sum of two inputs does not give the sum of the outputs."""
    before = torch.cat([x.new_zeros(1), x[:-1]])
    return x * before.abs() / (x.abs() + before.abs()).clamp_min(1e-30)


def _peeking(x: Tensor) -> Tensor:
    return x + torch.cat([x[1:], x.new_zeros(1)])


def _last_only(x: Tensor) -> Tensor:
    """The first token hears of the last one, and nothing else is wrong."""
    y = x.clone()
    y[0] = y[0] + x[-1]
    return y


def _says(examine: Any, layer: Layer, name: str, expected: Any, what: str) -> None:
    found = examine(layer, LENGTH)
    assert isinstance(found, dict) and {"causal", "linear", "time_invariant", "states"} <= set(found), (
        "examine returns a dict with causal, linear, time_invariant and states"
    )
    assert found[name] == expected and (found[name] is None) == (expected is None), (
        f"{what}: {name} is {found[name]}, expected {expected}"
    )


@box.part("says who sees the future", points=2)
def _(examine, rng):
    _says(examine, _invariant(rng, 2), "causal", True, "a recurrence")
    _says(examine, _varying(rng, 2), "causal", True, "a recurrence with decays of each position")
    _says(examine, _selective, "causal", True, "a selective scan")
    _says(examine, _peeking, "causal", False, "a layer that sees one token ahead")
    _says(examine, _last_only, "causal", False, "a layer whose first output sees the last input")


@box.part("says what is linear", points=2)
def _(examine, rng):
    _says(examine, _invariant(rng, 3), "linear", True, "a recurrence")
    _says(examine, _varying(rng, 2), "linear", True, "a recurrence with decays of each position")
    _says(examine, _selective, "linear", False, "a selective scan")
    _says(examine, _homogeneous, "linear", False, "a layer that scales with its input")
    bias = torch.rand(1, generator=rng, dtype=torch.float64) + 0.5
    _says(examine, lambda x: x + bias, "linear", False, "a layer that adds a constant")


@box.part("says what a delay leaves as it is", points=2)
def _(examine, rng):
    _says(examine, _invariant(rng, 2), "time_invariant", True, "a recurrence")
    _says(examine, _selective, "time_invariant", True, "a selective scan, whose gates see tokens only")
    _says(examine, _varying(rng, 2), "time_invariant", False, "a recurrence with decays of each position")
    _says(examine, _varying(rng, 1, 14), "time_invariant", False, "a recurrence that changes late")


@box.part("counts the states", points=2)
def _(examine, rng):
    for n in (1, 2, 3):
        _says(examine, _invariant(rng, n), "states", n, f"a recurrence of {n} states")
        _says(examine, _varying(rng, n), "states", n, f"a recurrence of {n} states, varying")
    _says(examine, lambda x: 3 * x, "states", 0, "a layer without a memory")
    _says(examine, _selective, "states", None, "a selective scan")
    _says(examine, _peeking, "states", None, "a layer that sees the future")


_BODY = """
import torch
def examine(layer, length):
    rng = torch.Generator().manual_seed(2)
    x, z = torch.randn(2, length, generator=rng, dtype=torch.float64)
    def same(a, b):
        return bool(torch.allclose(a, b, atol=1e-10))
    M = torch.stack([layer(unit) for unit in torch.eye(length, dtype=x.dtype)], dim=1)
    causal = all(same(layer(torch.cat([x[:t], z[t:]]))[:t], layer(x)[:t]) for t in range(1, length))
    linear = same(layer(x + z), layer(x) + layer(z))
    def late(t):
        return torch.cat([x.new_zeros(t), x[:-t]])
    invariant = all(same(layer(late(t))[t:], layer(x)[:-t]) for t in range(1, length))
    ranks = [int(torch.linalg.matrix_rank(M[t:, :t], atol=1e-9)) for t in range(1, length)]
    states = max(ranks) if linear and causal else None
    {change}
    return {"causal": causal, "linear": linear, "time_invariant": invariant, "states": states}
"""


def _wrong_box(mistake: str, change: str) -> None:
    box.wrong(mistake, _BODY.replace("{change}", change))


_wrong_box(
    "the future changed in one place, the first output watched",
    "causal = same(layer(torch.cat([x[:10], z[10:]]))[:1], layer(x)[:1])",
)
_wrong_box("linearity by doubling", "linear = same(layer(2 * x), 2 * layer(x))")
_wrong_box(
    "a delay of one token, the first outputs watched", "invariant = same(layer(late(1))[1:9], layer(x)[:8])"
)
_wrong_box("time invariance needs linearity", "invariant = invariant and linear")
_wrong_box(
    "the rank of the whole matrix", "states = int(torch.linalg.matrix_rank(M)) if linear and causal else None"
)
_wrong_box("the rank of one block at the edge", "states = min(ranks) if linear and causal else None")
_wrong_box("states of a layer that is not linear", "states = max(ranks)")

# ---------------------------------------------------------------------------------------------------------
# What a sequence costs: the state (module 1), memory (module 3), the cache (module 4)

budget = Exercise("midterm-budget", "budget", "What does a sequence cost?", stars=2, minutes=30, graded=True)


def _plan(rng: torch.Generator) -> dict[str, Any]:
    """Sizes of a hybrid with at least one layer of each kind."""

    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (), generator=rng))]

    letters = ["M"] * pick(2, 3, 7) + ["*"] * pick(1, 2) + ["-"] * pick(1, 3)
    order = torch.randperm(len(letters), generator=rng).tolist()
    return {
        "pattern": "".join(letters[i] for i in order),
        "d_model": pick(64, 128, 192),
        "d_state": pick(4, 16, 24),
        "kv_heads": pick(1, 2, 4),
        "head_dim": pick(16, 32),
        "batch": pick(2, 3, 5),
    }


def _held(plan: dict[str, Any], context: int) -> int:
    """Bytes of the state that the library makes for such a model."""
    attention = mambakit.layers.AttentionConfig(
        n_heads=4, n_kv_heads=plan["kv_heads"], head_dim=plan["head_dim"]
    )
    config = mambakit.LanguageModelConfig(
        vocab_size=8,
        d_model=plan["d_model"],
        pattern=plan["pattern"],
        mixers={"M": mambakit.layers.Mamba1Config(d_state=plan["d_state"]), "*": attention},
    )
    model = mambakit.LanguageModel(config, device="meta")
    state = model.init_state(plan["batch"], max_length=context, device="meta", dtype=torch.bfloat16)
    return sum(tensor.nbytes for _, tensor in state.tensors() if tensor.is_floating_point())


@budget.part("is what the library's model holds at two contexts", points=4)
def _(budget, rng):
    plan = _plan(rng)
    fixed, growing, _ = budget(**plan, limit=10**12)
    for context in (16, 1000):
        held = _held(plan, context)
        assert fixed + context * growing == held, (
            f"{plan}: {context} tokens take {fixed + context * growing} bytes, expected {held}"
        )


@budget.part("the longest context fits, and one token more does not", points=2)
def _(budget, rng):
    plan = _plan(rng)
    limit = _held(plan, 700) + int(torch.randint(1, 30, (), generator=rng))
    *_, longest = budget(**plan, limit=limit)
    assert _held(plan, max(1, int(longest))) <= limit, f"a context of {longest} takes more than {limit} bytes"
    assert _held(plan, int(longest) + 1) > limit, f"{longest} is not the longest context for {limit} bytes"


@budget.part("no end without attention, nothing where the states alone are too much")
def _(budget, rng):
    plan = _plan(rng)
    pure = {**plan, "pattern": plan["pattern"].replace("*", "M")}
    *_, longest = budget(**pure, limit=10**12)
    assert longest is None, f"a model without attention reaches {longest}, expected None"
    *_, longest = budget(**plan, limit=10)
    assert longest == 0, f"10 bytes are enough for {longest} tokens, expected 0"


_BUDGET = """
def budget(pattern, d_model, d_state, kv_heads, head_dim, batch, limit):
    fixed = batch * pattern.count("M") * 2 * d_model * (4 * d_state + 6)
    growing = batch * pattern.count("*") * 4 * kv_heads * head_dim
    {change}
    if fixed > limit:
        return fixed, growing, 0
    return fixed, growing, (limit - fixed) // growing if growing else None
"""


def _wrong_budget(mistake: str, change: str) -> None:
    budget.wrong(mistake, _BUDGET.replace("{change}", change))


_wrong_budget("keys without values", "growing = growing // 2")
_wrong_budget("the convolution forgotten", 'fixed = batch * pattern.count("M") * 2 * d_model * 4 * d_state')
_wrong_budget("states in bfloat16", 'fixed = batch * pattern.count("M") * 2 * d_model * (2 * d_state + 6)')
_wrong_budget("one sequence only", "fixed, growing = fixed // batch, growing // batch")
_wrong_budget(
    "every layer has a cache", "growing = growing // pattern.count('*') * len(pattern) if growing else 0"
)
_wrong_budget(
    "the budget of the whole is spent on the cache",
    "return fixed, growing, limit // growing if growing else None",
)
_wrong_budget("no end forgotten", "return fixed, growing, max(0, (limit - fixed) // max(1, growing))")
