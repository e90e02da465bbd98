"""Checks of module 4."""

from __future__ import annotations

import torch

from coursekit.exercises import Exercise, close


def _whole(rng: torch.Generator, low: int, high: int) -> int:
    """A number from `low` to `high`."""
    return int(torch.randint(low, high + 1, (), generator=rng))


# ---------------------------------------------------------------------------------------------------------
# Memory

cache_bytes = Exercise("m4-cache-bytes", "cache_bytes", "Bytes of a cache with windows", stars=1, minutes=10)


def _counted(windows, kv_heads: int, head_dim: int, length: int) -> int:
    """The same from the states that the library makes, without memory."""
    from mambakit import AttentionConfig

    total = 0
    for window in windows:
        config = AttentionConfig(n_heads=kv_heads, head_dim=head_dim, window=window)
        state = config.build(16, device="meta").init_state(1, max_length=length, dtype=torch.bfloat16)
        total += sum(state[name].numel() * 2 for name in ("k", "v"))
    return total


@cache_bytes.part("full layers: what the library's state occupies")
def _(cache_bytes, rng):
    heads, dim, length = _whole(rng, 1, 8), 2 * _whole(rng, 4, 64), _whole(rng, 10, 5000)
    windows = [None] * _whole(rng, 1, 6)
    got, expected = cache_bytes(windows, heads, dim, length), _counted(windows, heads, dim, length)
    assert got == expected, f"{got} bytes, the library's state has {expected}"


@cache_bytes.part("windows: no more than the window, and no more than there are tokens")
def _(cache_bytes, rng):
    heads, dim, length = _whole(rng, 1, 8), 2 * _whole(rng, 4, 64), _whole(rng, 100, 5000)
    windows = [None, length // 3, 2 * length]
    got, expected = cache_bytes(windows, heads, dim, length), _counted(windows, heads, dim, length)
    assert got == expected, f"{got} bytes, the library's state has {expected}"


@cache_bytes.part("one byte a number is half of two")
def _(cache_bytes, rng):
    sizes = (_whole(rng, 1, 8), 64, _whole(rng, 100, 5000))
    one, two = (cache_bytes([None, 64], *sizes, size=s) for s in (1, 2))
    assert 2 * one == two > 0, f"{one} bytes with 8 bits, {two} with 16"


cache_bytes.wrong(
    "keys without values",
    """
def cache_bytes(windows, kv_heads, head_dim, length, size=2):
    tokens = sum(length if w is None else min(w, length) for w in windows)
    return kv_heads * head_dim * size * tokens
""",
)
cache_bytes.wrong(
    "a window that is full from the start",
    """
def cache_bytes(windows, kv_heads, head_dim, length, size=2):
    return 2 * kv_heads * head_dim * size * sum(w or length for w in windows)
""",
)
cache_bytes.wrong(
    "always 16 bits",
    """
def cache_bytes(windows, kv_heads, head_dim, length, size=2):
    tokens = sum(length if w is None else min(w, length) for w in windows)
    return 4 * kv_heads * head_dim * tokens
""",
)

afford = Exercise("m4-afford", "afford", "How much attention fits the card", stars=2, minutes=20, graded=True)


def _needs(attention, weights, layers, batch, length, per_token, per_layer) -> int:
    """Bytes of a plan, summed layer by layer."""
    each = [per_token * length] * attention + [per_layer] * (layers - attention)
    return weights + sum(batch * bytes for bytes in each)


def _serving(rng: torch.Generator) -> dict[str, int]:
    return {
        "weights": _whole(rng, 100, 200) * 10**6,
        "layers": _whole(rng, 8, 40),
        "batch": _whole(rng, 2, 9),
        "length": _whole(rng, 500, 900),
        "per_token": _whole(rng, 300, 500),
        "per_layer": _whole(rng, 10_000, 20_000),
    }


@afford.part("the plan fits, and one more attention layer would not", points=2)
def _(afford, rng):
    serving = _serving(rng)
    wanted = _whole(rng, 1, serving["layers"] - 2)
    for extra in (0, serving["batch"] * serving["per_layer"]):
        card = _needs(wanted, **serving) + extra
        got = afford(card=card, **serving)
        assert got == wanted, f"{got} layers of attention on a card of {card} bytes, expected {wanted}"


@afford.part("no more attention layers than layers, however large the card", points=1)
def _(afford, rng):
    serving = _serving(rng)
    got = afford(card=10**15, **serving)
    assert got == serving["layers"], f"{got} of {serving['layers']} layers"


@afford.part("-1 where not even Mamba layers alone fit, 0 where just those do", points=1)
def _(afford, rng):
    serving = _serving(rng)
    least = _needs(0, **serving)
    got = [afford(card=least - 1, **serving), afford(card=least, **serving)]
    assert got == [-1, 0], f"one byte short and just enough: {got}, expected [-1, 0]"


afford.wrong(
    "the Mamba layers that attention replaces are counted still",
    """
def afford(card, weights, layers, batch, length, per_token, per_layer):
    left = card - weights - batch * layers * per_layer
    if left < 0:
        return -1
    return min(layers, left // (batch * per_token * length))
""",
)
afford.wrong(
    "one sequence instead of a batch",
    """
def afford(card, weights, layers, batch, length, per_token, per_layer):
    for a in range(layers, -1, -1):
        if weights + a * per_token * length + (layers - a) * per_layer <= card:
            return a
    return -1
""",
)
afford.wrong(
    "no bound by the number of layers",
    """
def afford(card, weights, layers, batch, length, per_token, per_layer):
    left = card - weights - batch * layers * per_layer
    if left < 0:
        return -1
    return left // (batch * (per_token * length - per_layer))
""",
)
afford.wrong(
    "nothing fits is reported as none",
    """
def afford(card, weights, layers, batch, length, per_token, per_layer):
    left = card - weights - batch * layers * per_layer
    return max(0, min(layers, left // (batch * (per_token * length - per_layer))))
""",
)

# ---------------------------------------------------------------------------------------------------------
# Recall

state_bits = Exercise("m4-state-bits", "state_bits", "The least state of a phone book", stars=1, minutes=10)


@state_bits.part("every book has a state of its own, and one bit less is too little")
def _(state_bits, rng):
    names, numbers = _whole(rng, 2, 40), _whole(rng, 3, 50)
    bits = state_bits(names, numbers)
    assert 2**bits >= numbers**names, f"{bits} bits do not tell {numbers}^{names} books apart"
    assert 2 ** (bits - 1) < numbers**names, f"{bits} bits are more than needed"


@state_bits.part("large books, to the bit: 1000 entries out of 2^20 numbers")
def _(state_bits, rng):
    names = _whole(rng, 900, 1100)
    bits = state_bits(names, 2**20)
    assert bits == 20 * names, f"{bits} bits, expected {20 * names}"


state_bits.wrong(
    "rounded up for every entry",
    """
import math
def state_bits(names, numbers):
    return names * (math.ceil(math.log2(numbers)) + (numbers & (numbers - 1) == 0))
""",
)
state_bits.wrong(
    "the bits of one entry",
    """
import math
def state_bits(names, numbers):
    return math.ceil(math.log2(numbers * names))
""",
)
state_bits.wrong(
    "natural logarithm",
    """
import math
def state_bits(names, numbers):
    return math.ceil(names * math.log(numbers))
""",
)

linear_memory = Exercise(
    "m4-linear-memory", "linear_memory", "A memory of outer products", stars=2, minutes=20, graded=True
)


def _pairs(rng: torch.Generator, K: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return draw(K, n), draw(K, 5), draw(3, n)


@linear_memory.part("equals the loop over pairs", points=2)
def _(linear_memory, rng):
    keys, values, queries = _pairs(rng, 12, 7)
    decay = 0.5 + 0.5 * torch.rand((), generator=rng).item()
    state = torch.zeros(7, 5, dtype=torch.float64)
    for k, v in zip(keys, values, strict=True):
        state = decay * state + torch.outer(k, v)
    close(linear_memory(keys, values, queries, decay), queries @ state, "what is read", 1e-9)


@linear_memory.part("orthogonal keys without decay give every value back", points=1)
def _(linear_memory, rng):
    keys, values, _ = _pairs(rng, 7, 7)
    keys = torch.linalg.qr(keys).Q
    close(linear_memory(keys, values, keys, 1.0), values, "the values", 1e-9)


@linear_memory.part("the last pair is not faded, the one before once", points=1)
def _(linear_memory, rng):
    keys, values, _ = _pairs(rng, 2, 4)
    keys = torch.linalg.qr(keys.T).Q.T
    got = linear_memory(keys, values, keys, 0.5)
    close(got, values * torch.tensor([[0.5], [1.0]], dtype=torch.float64), "what is read", 1e-9)


linear_memory.wrong(
    "softmax attention",
    """
import torch
def linear_memory(keys, values, queries, decay):
    return (queries @ keys.T).softmax(-1) @ values
""",
)
linear_memory.wrong(
    "faded once too often",
    """
import torch
def linear_memory(keys, values, queries, decay):
    age = torch.arange(len(keys), 0, -1, dtype=keys.dtype)
    return queries @ (keys.T @ (decay ** age[:, None] * values))
""",
)
linear_memory.wrong(
    "the newest fades most",
    """
import torch
def linear_memory(keys, values, queries, decay):
    age = torch.arange(len(keys), dtype=keys.dtype)
    return queries @ (keys.T @ (decay ** age[:, None] * values))
""",
)

# ---------------------------------------------------------------------------------------------------------
# Jamba

plan = Exercise("m4-plan", "plan", "The layers of a Jamba", stars=1, minutes=10)


def _published(layers: int, **keys: int):
    """A small Jamba in the library's words."""
    from mambakit.families.jamba import JambaJSON

    return JambaJSON(num_hidden_layers=layers, **keys)


@plan.part("the published model: what the library reads from its config.json")
def _(plan, rng):
    layers = 8 * _whole(rng, 1, 6)
    got, expected = plan(layers, 8, 4, 2, 1), _published(layers).ours().pattern
    assert got == expected, f"{got}, the library has {expected}"


@plan.part("other periods and offsets")
def _(plan, rng):
    a, e = _whole(rng, 3, 7), _whole(rng, 3, 5)
    keys = {"attn_layer_period": a, "attn_layer_offset": _whole(rng, 1, a - 1)}
    keys |= {"expert_layer_period": e, "expert_layer_offset": _whole(rng, 0, e - 2)}
    got, expected = plan(13, *keys.values()), _published(13, **keys).ours().pattern
    assert got == expected, f"{keys}: {got}, the library has {expected}"


plan.wrong(
    "mixers first, then all feed-forward parts",
    """
def plan(layers, attn_period, attn_offset, expert_period, expert_offset):
    mixers = ["*" if i % attn_period == attn_offset else "M" for i in range(layers)]
    return "".join(mixers + ["E" if i % expert_period == expert_offset else "-" for i in range(layers)])
""",
)
plan.wrong(
    "the offset ignored",
    """
def plan(layers, attn_period, attn_offset, expert_period, expert_offset):
    return "".join(
        ("*" if i % attn_period == attn_period // 2 else "M")
        + ("E" if i % expert_period == expert_period - 1 else "-")
        for i in range(layers)
    )
""",
)
plan.wrong(
    "layers counted from one",
    """
def plan(layers, attn_period, attn_offset, expert_period, expert_offset):
    return "".join(
        ("*" if i % attn_period == attn_offset else "M")
        + ("E" if i % expert_period == expert_offset else "-")
        for i in range(1, layers + 1)
    )
""",
)

count = Exercise("m4-count", "count", "The parameters of a Jamba", stars=2, minutes=20)


def _network(rng: torch.Generator, layers: int, experts: int):
    """Sizes for the reader and the parameters of the library's model without memory."""
    from mambakit import LanguageModel

    heads = 4 * _whole(rng, 1, 2)
    sizes = {"hidden": 8 * _whole(rng, 3, 9), "heads": heads, "kv_heads": heads // 2, "n": _whole(rng, 2, 9)}
    sizes |= {"r": _whole(rng, 2, 6), "w": _whole(rng, 3, 5), "vocab": _whole(rng, 50, 90)}
    d = heads * 2 * _whole(rng, 3, 6)
    config = _published(
        layers,
        hidden_size=d,
        intermediate_size=sizes["hidden"],
        num_attention_heads=heads,
        num_key_value_heads=sizes["kv_heads"],
        mamba_d_state=sizes["n"],
        mamba_dt_rank=sizes["r"],
        mamba_d_conv=sizes["w"],
        num_experts=experts,
        vocab_size=sizes["vocab"],
    ).ours()
    total = sum(p.numel() for p in LanguageModel(config, device="meta").parameters())
    return {"pattern": config.pattern, "d": d, "experts": experts, **sizes}, total


@count.part("one block of eight layers: the library's model to the last parameter", points=2)
def _(count, rng):
    sizes, total = _network(rng, 8, 4)
    got = count(**sizes)
    assert got == total, f"{got}, the library's model has {total}"


@count.part("without experts and without attention")
def _(count, rng):
    sizes, total = _network(rng, 3, 1)
    got = count(**sizes)
    assert got == total, f"{got} for {sizes['pattern']}, the library's model has {total}"


count.wrong(
    "as if all heads had their own keys, and no inner norms",
    """
def count(pattern, d, hidden, heads, kv_heads, n, r, w, experts, vocab):
    e = 2 * d
    sizes = {"M": 3 * d * e + e * (w + 1) + e * (r + 2 * n) + r * e + e + e * n + e,
             "*": 4 * d * d, "-": 3 * d * hidden, "E": experts * 3 * d * hidden + experts * d}
    return sum(sizes[kind] + d for kind in pattern) + 2 * vocab * d + d
""",
)
count.wrong(
    "tied embeddings",
    """
def count(pattern, d, hidden, heads, kv_heads, n, r, w, experts, vocab):
    e = 2 * d
    sizes = {"M": 3 * d * e + e * (w + 1) + e * (r + 2 * n) + r * e + e + e * n + e + r + 2 * n,
             "*": 2 * d * d + 2 * d * d * kv_heads // heads, "-": 3 * d * hidden,
             "E": experts * 3 * d * hidden + experts * d}
    return sum(sizes[kind] + d for kind in pattern) + vocab * d + d
""",
)

# ---------------------------------------------------------------------------------------------------------
# Mixture of experts

active = Exercise("m4-active", "active", "Active parameters", stars=1, minutes=10)


@active.part("equals a model with as many experts as a token uses, its routers apart")
def _(active, rng):
    from mambakit import LanguageModel

    experts, top_k, d, hidden = _whole(rng, 4, 9), _whole(rng, 1, 3), 32, 8 * _whole(rng, 2, 6)

    def total(number: int) -> int:
        config = _published(
            8, hidden_size=d, intermediate_size=hidden, num_attention_heads=4, num_key_value_heads=2
        )
        config = type(config)(**{**vars(config), "num_experts": number, "num_experts_per_tok": top_k})
        named = LanguageModel(config.ours(), device="meta").named_parameters()
        return sum(p.numel() for name, p in named if "router" not in name)

    spare = 2 if top_k == 1 else 0  # one expert alone would be no mixture in their words
    expected = total(top_k + spare) - 4 * spare * 3 * d * hidden
    got = active(total(experts), 3 * d * hidden, 4, experts, top_k)
    assert got == expected, f"{got}, expected {expected}"


@active.part("all experts in use: everything is active")
def _(active, rng):
    total = _whole(rng, 10**6, 10**7)
    got = active(total, 1000, 7, 5, 5)
    assert got == total, f"{got} of {total}"


active.wrong(
    "a share of everything",
    """
def active(total, expert, moe_layers, experts, top_k):
    return total * top_k // experts - 1
""",
)
active.wrong(
    "one layer only",
    """
def active(total, expert, moe_layers, experts, top_k):
    return total - (experts - top_k) * expert
""",
)
active.wrong(
    "the experts in use are taken away",
    """
def active(total, expert, moe_layers, experts, top_k):
    return total - moe_layers * top_k * expert
""",
)

router = Exercise("m4-router", "route", "A top-k router", stars=2, minutes=20, graded=True)


@router.part("equals the library's router, with and without division by the sum", points=2)
def _(route, rng):
    from mambakit.layers import MoEConfig

    for normalise in (False, True):
        config = MoEConfig(n_experts=7, top_k=3, d_hidden=8, normalise=normalise)
        layer = config.build(7, dtype=torch.float64).eval()
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(7))
            logits = torch.randn(20, 7, generator=rng, dtype=torch.float64)
            values, chosen = layer.route(logits)
        expected = torch.zeros_like(logits).scatter(-1, chosen, values)
        close(route(logits, 3, normalise), expected, f"the weights, normalise={normalise}", 1e-10)


@router.part("k weights in a row, in the order of the logits", points=1)
def _(route, rng):
    logits = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    weights = route(logits, 2, False)
    assert ((weights > 0).sum(-1) == 2).all(), "a row has not two positive weights"
    best = logits.argmax(-1)
    assert (weights.argmax(-1) == best).all(), "the largest weight is not the best expert's"


@router.part("gradients reach the logits of experts that were not chosen", points=1)
def _(route, rng):
    logits = torch.randn(5, 6, generator=rng, dtype=torch.float64).requires_grad_()
    route(logits, 2, False).sum().backward()
    assert (logits.grad != 0).all(), "some logits have no gradient: is the softmax over the chosen only?"


router.wrong(
    "softmax over the chosen experts",
    """
import torch
def route(logits, k, normalise):
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1))
""",
)
router.wrong(
    "every expert has its weight",
    """
import torch
def route(logits, k, normalise):
    return logits.softmax(-1)
""",
)
router.wrong(
    "the least likely experts",
    """
import torch
def route(logits, k, normalise):
    p = logits.softmax(-1)
    values, chosen = p.topk(k, dim=-1, largest=False)
    return torch.zeros_like(p).scatter(-1, chosen, values)
""",
)

# ---------------------------------------------------------------------------------------------------------
# Ratio

cheapest = Exercise("m4-cheapest", "cheapest", "The cheapest on the plateau", stars=1, minutes=10)


def _sweep(rng: torch.Generator) -> tuple[list[int], list[float]]:
    """Attention layers in any order, and perplexities with one minimum."""
    layers = torch.randperm(12, generator=rng).tolist()
    return layers, [8 + 0.02 * abs(n - 7) for n in layers]


@cheapest.part("without tolerance it is the best")
def _(cheapest, rng):
    got = cheapest(*_sweep(rng), 0.0)
    assert got == 7, f"{got}, the least perplexity is that of 7 layers"


@cheapest.part("with tolerance it is the first that is near enough, in any order of the list")
def _(cheapest, rng):
    wanted = _whole(rng, 1, 5)
    got = cheapest(*_sweep(rng), (0.02 * (7 - wanted) + 0.01) / 8)
    assert got == wanted, f"{got}, expected {wanted}"


cheapest.wrong(
    "the best, whatever it costs",
    """
def cheapest(layers, perplexity, tolerance):
    return layers[perplexity.index(min(perplexity))]
""",
)
cheapest.wrong(
    "the first in the list",
    """
def cheapest(layers, perplexity, tolerance):
    return next(n for n, p in zip(layers, perplexity) if p <= min(perplexity) * (1 + tolerance) + 0.05)
""",
)
cheapest.wrong(
    "the dearest that is near enough",
    """
def cheapest(layers, perplexity, tolerance):
    return max(n for n, p in zip(layers, perplexity) if p <= min(perplexity) * (1 + tolerance))
""",
)

spread = Exercise("m4-spread", "spread", "Attention layers, evenly spread", stars=2, minutes=15)


@spread.part("as many layers and as much attention as asked for")
def _(spread, rng):
    attention = _whole(rng, 1, 6)
    layers = 3 * attention + _whole(rng, 1, 20)
    got = spread(layers, attention)
    assert (len(got), got.count("*")) == (layers, attention), f"{got!r} for {layers} layers, {attention} *"


@spread.part("runs of M differ by at most one, and the ends are M")
def _(spread, rng):
    attention = _whole(rng, 2, 6)
    layers = 3 * attention + _whole(rng, 2, 20)
    runs = [len(run) for run in spread(layers, attention).split("*")]
    assert min(runs) >= 1 and max(runs) - min(runs) <= 1, f"runs of {runs}"


spread.wrong(
    "periods from the start",
    """
def spread(layers, attention):
    period = layers // attention
    return "".join("*" if i % period == 0 and i // period < attention else "M" for i in range(layers))
""",
)
spread.wrong(
    "what is left over at the end",
    """
def spread(layers, attention):
    run = "M" * ((layers - attention) // (attention + 1))
    return (run + "*") * attention + run + "M" * 3
""",
)

# ---------------------------------------------------------------------------------------------------------
# Hybrid block

continue_mask = Exercise(
    "m4-continue-mask", "continue_mask", "The mask of a continuation", stars=2, minutes=15
)


@continue_mask.part("the last rows of the mask of the whole sequence")
def _(continue_mask, rng):
    past, new = _whole(rng, 1, 9), _whole(rng, 2, 6)
    whole = torch.ones(past + new, past + new).tril().bool()
    got = continue_mask(past, new)
    assert got.shape == (new, past + new), f"shape {tuple(got.shape)}, expected {(new, past + new)}"
    assert torch.equal(got.bool(), whole[past:]), "a query sees what it must not, or misses what it may see"


@continue_mask.part("with a window, as many keys as it says, the query's own among them")
def _(continue_mask, rng):
    window, new = _whole(rng, 2, 4), _whole(rng, 2, 6)
    got = continue_mask(10, new, window).bool()
    assert (got.sum(1) == window).all(), f"rows see {got.sum(1).tolist()} keys, expected {window}"
    assert got.diagonal(10).all(), "a query does not see its own key"


continue_mask.wrong(
    "as if there were no cache",
    """
import torch
def continue_mask(past, new, window=None):
    mask = torch.ones(new, past + new).tril().bool()
    return mask if window is None else mask.triu(1 - window)
""",
)
continue_mask.wrong(
    "the query's own key is missing",
    """
import torch
def continue_mask(past, new, window=None):
    mask = torch.ones(new, past + new).tril(past - 1).bool()
    return mask if window is None else mask.triu(past - window)
""",
)
continue_mask.wrong(
    "the window is forgotten",
    """
import torch
def continue_mask(past, new, window=None):
    return torch.ones(new, past + new).tril(past).bool()
""",
)

hybrid_mixer = Exercise(
    "m4-hybrid-mixer", "hybrid_mixer", "A hybrid with one state", stars=3, minutes=30, graded=True
)


def _streams(rng: torch.Generator, l: int = 11, d: int = 4) -> list[torch.Tensor]:
    a = torch.rand(l, d, generator=rng, dtype=torch.float64)
    return [a, *torch.randn(4, l, d, generator=rng, dtype=torch.float64)]


@hybrid_mixer.part("equals the library's scan and attention", points=2)
def _(hybrid_mixer, rng):
    from mambakit import ops

    a, u, q, k, v = _streams(rng)
    h, _ = ops.linear_scan(a[None], ((1 - a) * u)[None])
    look, _ = ops.attention(q[None, :, None], k[None, :, None], v[None, :, None])
    close(hybrid_mixer(a, u, q, k, v, None)[0], h[0] + look[0, :, 0], "the outputs", 1e-10)


@hybrid_mixer.part("prefill and decode equal one pass", points=2)
def _(hybrid_mixer, rng):
    streams = _streams(rng)
    whole, _ = hybrid_mixer(*streams, None)
    state, pieces = None, []
    for piece in zip(*(s.split([5, 1, 1, 4]) for s in streams), strict=True):
        y, state = hybrid_mixer(*piece, state)
        pieces.append(y)
    assert torch.cat(pieces).abs().sum() > 0, "all outputs are zero"
    close(torch.cat(pieces), whole, "the pieces together", 1e-10)


@hybrid_mixer.part("a changed token changes no earlier output", points=1)
def _(hybrid_mixer, rng):
    streams = _streams(rng)
    before = hybrid_mixer(*streams, None)[0]
    changed = [s.clone() for s in streams]
    for s in changed:
        s[7:] *= 0.5
    after = hybrid_mixer(*changed, None)[0]
    close(after[:7], before[:7], "the outputs before the change", 1e-12)
    assert not torch.allclose(after[7:], before[7:]), "the outputs after the change are the same"


hybrid_mixer.wrong(
    "attention is not causal",
    """
import torch
def hybrid_mixer(a, u, q, k, v, state):
    h, K, V = (torch.zeros_like(u[0]), k[:0], v[:0]) if state is None else state
    K, V, hs = torch.cat([K, k]), torch.cat([V, v]), []
    for t in range(len(u)):
        h = a[t] * h + (1 - a[t]) * u[t]
        hs.append(h)
    return torch.stack(hs) + (q @ K.T / u.shape[1] ** 0.5).softmax(-1) @ V, (h, K, V)
""",
)
hybrid_mixer.wrong(
    "the recurrence begins anew with every piece",
    """
import torch
def hybrid_mixer(a, u, q, k, v, state):
    h, K, V = (torch.zeros_like(u[0]), k[:0], v[:0]) if state is None else state
    h, m = torch.zeros_like(u[0]), len(K)
    K, V, hs = torch.cat([K, k]), torch.cat([V, v]), []
    for t in range(len(u)):
        h = a[t] * h + (1 - a[t]) * u[t]
        hs.append(h)
    future = torch.ones(len(u), len(K), dtype=torch.bool).triu(m + 1)
    s = (q @ K.T / u.shape[1] ** 0.5).masked_fill(future, -torch.inf)
    return torch.stack(hs) + s.softmax(-1) @ V, (h, K, V)
""",
)
hybrid_mixer.wrong(
    "an input without its gate, scores without their scale",
    """
import torch
def hybrid_mixer(a, u, q, k, v, state):
    h, K, V = (torch.zeros_like(u[0]), k[:0], v[:0]) if state is None else state
    m = len(K)
    K, V, hs = torch.cat([K, k]), torch.cat([V, v]), []
    for t in range(len(u)):
        h = a[t] * h + u[t]
        hs.append(h)
    future = torch.ones(len(u), len(K), dtype=torch.bool).triu(m + 1)
    return torch.stack(hs) + (q @ K.T).masked_fill(future, -torch.inf).softmax(-1) @ V, (h, K, V)
""",
)

# ---------------------------------------------------------------------------------------------------------
# Other hybrids

distance = Exercise("m4-distance", "farthest", "Blocks without attention", stars=1, minutes=10)


@distance.part("the run that was planted, in the middle or at an end")
def _(farthest, rng):
    long = _whole(rng, 6, 12)
    for place in range(3):
        runs = ["M-M", "MM", "M"]
        runs[place] = "M" * long
        got = farthest("*".join(runs))
        assert got == long, f"{got} for {'*'.join(runs)}, expected {long}"


@distance.part("nothing but attention: 0; none at all: everything")
def _(farthest, rng):
    n = _whole(rng, 2, 9)
    got = [farthest("*" * n), farthest("M" * n)]
    assert got == [0, n], f"{got}, expected {[0, n]}"


distance.wrong(
    "the ends are forgotten",
    """
def farthest(pattern):
    places = [i for i, c in enumerate(pattern) if c == "*"]
    return max((b - a - 1 for a, b in zip(places, places[1:])), default=0)
""",
)
distance.wrong(
    "the period instead of the run",
    """
def farthest(pattern):
    return 1 + max(len(run) for run in pattern.split("*"))
""",
)

shared = Exercise("m4-shared", "shared_cost", "Weights and caches of a shared block", stars=2, minutes=15)


@shared.part("parameters: each set once, and no more sets than uses")
def _(shared_cost, rng):
    weights = _whole(rng, 100, 999)
    got = [shared_cost(uses, blocks, weights, 4, 10)[0] for uses, blocks in ((13, 1), (9, 2), (3, 5))]
    tensors = [len({use % blocks for use in range(uses)}) for uses, blocks in ((13, 1), (9, 2), (3, 5))]
    assert got == [n * weights for n in tensors], f"{got}, expected {[n * weights for n in tensors]}"


@shared.part("caches: every use has its own")
def _(shared_cost, rng):
    length, uses = _whole(rng, 100, 999), _whole(rng, 2, 13)
    got = shared_cost(uses, 1, 50, 8, length)[1]
    assert got == sum(8 * length for _ in range(uses)), f"{got} bytes, expected {8 * length * uses}"


shared.wrong(
    "one cache for all uses",
    """
def shared_cost(uses, blocks, weights, per_token, length):
    return min(blocks, uses) * weights, blocks * per_token * length
""",
)
shared.wrong(
    "weights for every use",
    """
def shared_cost(uses, blocks, weights, per_token, length):
    return uses * weights, uses * per_token * length
""",
)

# ---------------------------------------------------------------------------------------------------------
# Reading the paper

errors = Exercise("m4-errors", "errors_apart", "Is a difference chance?", stars=1, minutes=10)


@errors.part("equals a simulation of many pairs of tests")
def _(errors_apart, rng):
    p, q, n = 0.2 + 0.1 * torch.rand((), generator=rng).item(), 0.5, 400
    chances = torch.tensor([p, q])[:, None].expand(2, 4000)
    shares = torch.binomial(torch.full((2, 4000), float(n)), chances, generator=rng) / n
    expected = (q - p) / (shares[1] - shares[0]).std().item()
    got = errors_apart(p, q, n)
    assert abs(got / expected - 1) < 0.06, f"{got:.2f}, in a simulation {expected:.2f}"


@errors.part("four times the questions: twice as far; exchanged models: the other sign")
def _(errors_apart, rng):
    p, q = torch.rand(2, generator=rng).mul(0.8).add(0.1).tolist()
    one, four, back = errors_apart(p, q, 100), errors_apart(p, q, 400), errors_apart(q, p, 100)
    assert abs(four - 2 * one) < 1e-9 and abs(back + one) < 1e-9, f"{one}, {four}, exchanged {back}"


errors.wrong(
    "the error of one of them",
    """
def errors_apart(p, q, n):
    return (q - p) / (p * (1 - p) / n) ** 0.5
""",
)
errors.wrong(
    "standard deviation without n",
    """
def errors_apart(p, q, n):
    return (q - p) / (p * (1 - p) + q * (1 - q)) ** 0.5
""",
)

questions = Exercise("m4-questions", "questions", "How many questions a benchmark needs", stars=2, minutes=10)


@questions.part("enough, and one fewer is not")
def _(questions, rng):
    p = 0.4 + 0.2 * torch.rand((), generator=rng).item()
    q, z = p + 0.02, 1.5 + torch.rand((), generator=rng).item()
    n = questions(p, q, z)

    def apart(n: int) -> float:
        return (q - p) / ((p * (1 - p) + q * (1 - q)) / n) ** 0.5

    assert apart(n) >= z - 1e-9, f"with {n} questions they lie {apart(n):.4f} apart, less than {z:.4f}"
    assert apart(n - 1) < z, f"{n - 1} questions are enough"


@questions.part("half the difference needs about four times as many")
def _(questions, rng):
    p = 0.4 + 0.2 * torch.rand((), generator=rng).item()
    ratio = questions(p, p + 0.01, 2.0) / questions(p, p + 0.02, 2.0)
    assert 3.8 < ratio < 4.2, f"{ratio:.2f} times as many"


questions.wrong(
    "one model's error only",
    """
def questions(p, q, z):
    return int(-(-z**2 * p * (1 - p) // (q - p) ** 2))
""",
)
questions.wrong(
    "z and the difference not squared",
    """
def questions(p, q, z):
    return int(-(-z * (p * (1 - p) + q * (1 - q)) // abs(q - p)))
""",
)
