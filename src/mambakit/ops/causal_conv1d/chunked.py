"""The causal convolution for all tokens at once: one shifted multiply-add per tap.

The taps run over a window, the inputs preceded by the state, so that no tap needs a border case. Autograd's
own derivative of shifted slices builds a zero-padded gradient per tap; the derivative is stated here
instead, as the same correlation with the taps reversed, and stays differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.causal_conv1d import reference
from mambakit.ops.shapes import same_document

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectorised form of `mambakit.ops.causal_conv1d`."""
    batch, length, d = x.shape
    if length == 1:
        return reference.causal_conv1d(x, weight, bias, initial_state, seq_idx, activation)
    work, w = torch.promote_types(x.dtype, torch.float32), weight.shape[1]
    past = x.new_zeros(batch, w - 1, d, dtype=work) if initial_state is None else initial_state.to(work)
    window = torch.cat([past, x.to(work)], dim=1)  # (b, w - 1 + l, d)
    open_taps = None if seq_idx is None else _open_taps(seq_idx, w)

    y = _Correlation.apply(window, weight.to(work), None if bias is None else bias.to(work), open_taps)
    y = F.silu(y) if activation == "silu" else y

    final = window[:, length:]
    if open_taps is None:
        final = final.clone()  # a view would keep the whole window alive
    else:
        # As seen by the next token, every input lies one tap further back.
        final = torch.where(open_taps[:, -1, 1:, None], final, torch.zeros_like(final))
    return y.to(x.dtype), final


def _open_taps(seq_idx: Tensor, w: int) -> Tensor:
    """Whether tap `k` of token `t` stays inside the token's document `(b, l, w)`.

    A tap is open if every step between its input and the token continues a document. The state before the
    first token belongs to the first document.
    """
    batch, length = seq_idx.shape
    continues = F.pad(same_document(seq_idx), (w - 1, 0), value=True)
    taps = [continues.new_ones(batch, length)]
    for distance in range(1, w):
        step = continues[:, w - distance : w - distance + length]
        taps.append(taps[-1] & step)
    return torch.stack(taps[::-1], dim=2)


class _Correlation(torch.autograd.Function):
    """`y_t = bias + sum_k weight[:, k] window[:, t + k]` over the open taps, with its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(window: Tensor, weight: Tensor, bias: Tensor | None, open_taps: Tensor | None) -> Tensor:
        """Correlate `(b, w - 1 + l, d)` with `(d, w)` into `(b, l, d)`."""
        if open_taps is None and _is_onednn(window):
            return _by_convolution(window, weight, bias)
        y = _tap(window, weight, open_taps, 0) * weight[:, 0]
        y = y if bias is None else y.add_(bias)
        for k in range(1, weight.shape[1]):
            y.addcmul_(_tap(window, weight, open_taps, k), weight[:, k])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, nothing else."""
        window, weight, bias, open_taps = inputs
        ctx.save_for_backward(window, weight, open_taps)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Correlate the gradient with the reversed taps, and with the window."""
        window, weight, open_taps = ctx.saved_tensors
        w = weight.shape[1]
        grad_window = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and open_taps is None:
            padded = F.pad(grad, (0, 0, w - 1, w - 1))
            grad_window = _Correlation.apply(padded, weight.flip(1), None, None)
        elif ctx.needs_input_grad[0]:
            grad_window = torch.zeros_like(window)
            for k in range(w):
                part = torch.where(open_taps[:, :, k, None], grad * weight[:, k], 0.0)
                grad_window = grad_window + F.pad(part, (0, 0, k, w - 1 - k))
        if ctx.needs_input_grad[1]:
            taps = [torch.linalg.vecdot(grad, _tap(window, weight, open_taps, k), dim=1) for k in range(w)]
            grad_weight = torch.stack(taps, dim=-1).sum(0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1))
        return grad_window, grad_weight, grad_bias, None


def _tap(window: Tensor, weight: Tensor, open_taps: Tensor | None, k: int) -> Tensor:
    """What tap `k` of every token sees `(b, l, d)`: zeros where it is closed, whatever lies there."""
    seen = window[:, k : window.shape[1] - weight.shape[1] + 1 + k]
    return seen if open_taps is None else torch.where(open_taps[:, :, k, None], seen, 0.0)


def _is_onednn(window: Tensor) -> bool:
    """Whether PyTorch runs a channels-last depthwise convolution of this by oneDNN: one pass, not `w`."""
    return _HAS_ONEDNN and window.device.type == "cpu" and window.dtype == torch.float32


def _by_convolution(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as a two-dimensional convolution of height 1, whose channels-last layout is ours as it is."""
    image = window.transpose(1, 2).unsqueeze(2)  # (b, d, 1, w - 1 + l), no copy
    y = F.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2).contiguous()  # already contiguous, unless PyTorch chose otherwise
