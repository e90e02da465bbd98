"""Softmax attention: the mixer that hybrids place between their scans.

Its state is the list of past keys and values, not a fixed-size summary, so it remembers everything and costs
memory for it. Queries may share keys (grouped heads), look back over a window only, and never see another
document. See MATH.md beside this file.
"""

from __future__ import annotations

from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.attention import chunked, reference
from mambakit.ops.attention.cache import KVCache, KVState, extend, extend_in_place, trim
from mambakit.ops.dispatch import Op

__all__ = ["KVCache", "KVState", "attention"]


def _flops(q: Tensor, k: Tensor, *_: object) -> int:
    # Scores and weighted sum, two operations each per query, key and channel, as if nothing were masked.
    return 4 * q.numel() * k.shape[1]


_op = Op("attention", {"chunked": chunked, "reference": reference}, flops=_flops)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: KVState | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    state: KVCache | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, KVState | KVCache]:
    """Let every token gather values from the tokens it may see.

    `y_t = sum_s softmax_s(scale <q_t, k_s>) v_s`, over the tokens `s` of the same document with
    `0 <= t - s < window` (without `causal`: `|t - s| < window`). Head `i` of `h` uses group `i // (h / g)`.
    Tokens are of one document while `seq_idx` stays the same from each token to the next, past ones included.

    Args:
        q: Queries `(b, l, h, p)`.
        k: Keys `(b, l, g, p)`, with `h` a multiple of `g`.
        v: Values `(b, l, g, p)`.
        initial_state: Past keys and values, `m` tokens; differentiable.
        causal: Whether a token sees only itself and earlier ones.
        window: How many tokens back a query sees, itself included; all by default.
        scale: Factor on the scores; `p ** -0.5` by default.
        state: A cache to continue from, overwritten in place with the new tokens and advanced (inference);
            excludes `initial_state`.
        seq_idx: Document number of each token `(b, l)`, integers, compared with those of the past tokens;
            by default the last past document goes on, or all is document 0. A batch padded on the left gives
            its padding a number of its own; -1 is free for that.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(b, l, h, p)` in the type of `q`, and the final state: with `state`, that cache; else the
        past and new tokens together, the last `window - 1` where there is a window.

    Raises:
        ValueError: Shapes that do not fit, heads not divisible into groups, a window below 1, a state without
            `causal`, both states at once, a full cache, an empty sequence, or a backend that cannot take the
            inputs.

    Source:
        Vaswani et al., "Attention is all you need" (1706.03762), section 3.2; groups: Ainslie et al., "GQA"
        (2305.13245), section 2.2; window: Beltagy et al., "Longformer" (2004.05150), section 3.1.
    """
    if state is not None and initial_state is not None:
        raise ValueError("attention: give either initial_state or state, not both")
    name, past = ("initial_state", initial_state) if state is None else ("state", state)
    past_k, past_v, past_idx = (None, None, None) if past is None else past[:3]
    sizes = shapes.check(
        "attention",
        q=(q, "b l h p"),
        k=(k, "b l g p"),
        v=(v, "b l g p"),
        seq_idx=(seq_idx, "b l"),
        **{
            f"{name}.k": (past_k, "b m g p"),
            f"{name}.v": (past_v, "b m g p"),
            f"{name}.seq_idx": (past_idx, "b m"),
        },
    )
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"attention: {sizes['h']} heads do not split evenly into {sizes['g']} groups")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, expected at least 1 (the token itself)")
    if past is not None and not causal:
        raise ValueError(f"attention: {name} needs causal=True, or past tokens would have to see new ones")

    if state is None:
        tokens = extend(past, k, v, seq_idx, window)
        final = trim(tokens, window)
    else:
        final = KVCache(*state)
        tokens = extend_in_place(final, k, v, seq_idx, window)
    alone = seq_idx is None and tokens.k.shape[1] == sizes["l"]
    documents = None if alone else (~shapes.same_document(tokens.seq_idx)).cumsum(1)
    scale = sizes["p"] ** -0.5 if scale is None else float(scale)
    keys, values = tokens.k.to(q.dtype), tokens.v.to(q.dtype)
    return _op(q, keys, values, documents, causal, window, scale, backend=backend), final
