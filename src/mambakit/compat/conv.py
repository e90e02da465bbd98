"""The functions of the package `causal_conv1d`, on `ops.causal_conv1d`.

Theirs are channels-first `(b, d, l)`, our operator is channels-last. A tensor that is a transposed view of
channels-last memory, which is what every Mamba block hands over, is taken as it is; one that is contiguous
channels-first is copied once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambakit import ops
from mambakit.config import unknown

_ACTIVATIONS = (None, "silu", "swish")


def activation_of(name: str | None, function: str) -> str | None:
    """Our name of an activation: `swish` is another word for `silu`.

    Raises:
        NotImplementedError: Any other.
    """
    if name not in _ACTIVATIONS:
        raise NotImplementedError(
            f"{function}: {unknown('activation', str(name), ('silu', 'swish', 'None'))}"
        )
    return None if name is None else "silu"


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Filter every channel over time with its own causal taps; see `ops.causal_conv1d`.

    Args:
        x: Inputs `(b, d, l)`.
        weight: Taps `(d, w)`, oldest first.
        bias: Added before the activation `(d,)`.
        seq_idx: Document number of each token `(b, l)`; a negative one is padding, whose output is 0.
        initial_states: The `w - 1` inputs before the first token `(b, d, w - 1)`.
        return_final_states: Return the last `w - 1` inputs, too.
        final_states_out: Where to write them `(b, d, w - 1)`.
        activation: `None`, `"silu"` or `"swish"`.

    Returns:
        Outputs `(b, d, l)`, and the final states `(b, d, w - 1)` if asked for.

    Raises:
        ValueError: Shapes that do not fit, or `final_states_out` without `return_final_states`.
        NotImplementedError: Another activation.
    """
    if final_states_out is not None and not return_final_states:
        raise ValueError("causal_conv1d_fn: final_states_out is given, but return_final_states is False")
    y, final = ops.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        None if initial_states is None else initial_states.transpose(1, 2),
        activation=activation_of(activation, "causal_conv1d_fn"),
        seq_idx=seq_idx,
    )
    y = y.transpose(1, 2)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if not return_final_states:
        return y
    final = final.transpose(1, 2).to(x.dtype)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Continue a convolution by a few tokens, from a state of past inputs that is overwritten in place.

    Args:
        x: Inputs `(b, d)` or `(b, d, l)`.
        conv_state: Past inputs `(b, d, m)` with `m >= w - 1`, newest last; with `conv_state_indices`, a pool
            of such rows.
        weight: Taps `(d, w)`.
        bias: Added before the activation `(d,)`.
        activation: `None`, `"silu"` or `"swish"`.
        cache_seqlens: Tokens seen so far `(b,)`, integers: the state is then a ring in which token `t` lies
            in column `t mod m`.
        conv_state_indices: Row of the pool that each sequence uses `(b,)`, integers; a negative one is
            padding: its output is 0 and no state changes.

    Returns:
        Outputs of the shape of `x`.

    Raises:
        ValueError: Shapes that do not fit, or more tokens than a ring has columns.
        NotImplementedError: Another activation.
    """
    activation = activation_of(activation, "causal_conv1d_update")
    if conv_state_indices is not None:
        return on_rows(
            lambda state: causal_conv1d_update(x, state, weight, bias, activation, cache_seqlens),
            conv_state,
            conv_state_indices,
        )
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x  # (b, d, l)
    columns, past = conv_state.shape[-1], weight.shape[1] - 1
    if columns < past:
        raise ValueError(f"causal_conv1d_update: conv_state has {columns} columns, expected at least {past}")
    if cache_seqlens is None:
        window = conv_state[..., columns - past :]
    else:
        window = conv_state.gather(2, _ring(cache_seqlens, -past, 0, conv_state))
    y, _ = ops.causal_conv1d(
        tokens.transpose(1, 2), weight, bias, window.transpose(1, 2), activation=activation
    )
    _remember(conv_state, tokens.detach(), cache_seqlens)
    return y.transpose(1, 2).reshape(x.shape)


def _ring(seen: Tensor, first: int, last: int, conv_state: Tensor) -> Tensor:
    """Columns of a ring `(b, d, last - first)` in which tokens `seen + first` to `seen + last - 1` lie."""
    tokens = seen.long().unsqueeze(1) + torch.arange(first, last, device=conv_state.device)
    columns = tokens.remainder(conv_state.shape[-1])
    return columns.unsqueeze(1).expand(-1, conv_state.shape[1], -1)


def _remember(conv_state: Tensor, tokens: Tensor, seen: Tensor | None) -> None:
    """Write new inputs `(b, d, l)` into a state in place."""
    columns, length = conv_state.shape[-1], tokens.shape[-1]
    tokens = tokens.to(conv_state.dtype)
    if seen is not None:
        if length > columns:
            raise ValueError(
                f"causal_conv1d_update: {length} tokens for a ring of {columns} columns, expected no more"
            )
        conv_state.scatter_(2, _ring(seen, 0, length, conv_state), tokens)
    elif length >= columns:
        conv_state.copy_(tokens[..., length - columns :])
    else:
        conv_state.copy_(torch.cat([conv_state[..., length:], tokens], dim=-1))


def on_rows(step: Callable[[Tensor], Tensor], pool: Tensor, rows: Tensor) -> Tensor:
    """Run an in-place step on rows of a pool of states.

    Args:
        step: Given the states of all sequences, overwrites them and returns the outputs `(b, ...)`.
        pool: The states.
        rows: Row of each sequence `(b,)`; a negative one is padding.

    Returns:
        The outputs, those of padding 0.
    """
    rows = rows.long()
    real = rows >= 0
    states = pool[rows.clamp(min=0)]
    y = step(states)
    pool[rows[real]] = states[real]
    return torch.where(real.view(-1, *[1] * (y.dim() - 1)), y, torch.zeros_like(y))


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of every one of several sequences that lie one after the other.

    Args:
        x: Inputs of all sequences `(tokens, d)`.
        cu_seqlens: First token of each sequence, and the number of tokens `(sequences + 1,)`.
        state_len: How many inputs to keep.

    Returns:
        States `(sequences, d, state_len)`, newest last; 0 where a sequence is shorter.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    tokens = ends.unsqueeze(1) + torch.arange(-state_len, 0, device=x.device)  # (sequences, state_len)
    own = tokens >= starts.unsqueeze(1)
    states = torch.where(
        own.unsqueeze(-1), x[tokens.clamp(min=0)], torch.zeros((), dtype=x.dtype, device=x.device)
    )
    return states.transpose(1, 2)
