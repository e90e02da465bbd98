"""`mamba_ssm.ops.triton.layer_norm`: dropout, residual sum and norm in one call, on `ops.norm`.

The sum is made and normalised in float32 at least, and rounded to the residual's type afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit import ops
from mambakit.compat.selective_scan import linear


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Add branches to a residual stream and normalise the sum.

    `s = residual + dropout(x * rowscale) + dropout(x1)`, `y = norm(s) * weight + bias`, and with a second
    weight `y1 = norm(s) * weight1 + bias1`.

    Args:
        x: A branch `(..., d)`.
        weight: Scale `(d,)`.
        bias: Shift `(d,)`.
        residual: The stream, of the shape of `x`.
        x1: A second branch of the shape of `x`; not together with `rowscale`.
        weight1: Scale of a second output `(d,)`.
        bias1: Its shift `(d,)`.
        eps: Added to the variance or mean square.
        dropout_p: Probability that an element of a branch is dropped.
        rowscale: Factor on each row of `x` `(...)`.
        prenorm: Return the sum, too.
        residual_in_fp32: The sum is float32 where no residual is given; otherwise of the residual's type.
        is_rms_norm: RMS norm instead of layer norm.
        return_dropout_mask: Return which elements of `x` and of `x1` were kept, `None` without dropout or
            without `x1`.

    Returns:
        `y`, then `y1`, the sum and the two masks, as far as asked for.

    Raises:
        ValueError: Shapes that do not fit, `x1` with `rowscale`, or `bias1` without `weight1`.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("layer_norm_fn: rowscale is given with x1, expected one of them")
    if bias1 is not None and weight1 is None:
        raise ValueError("layer_norm_fn: bias1 is given without weight1")
    for name, tensor in (("residual", residual), ("x1", x1)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(
                f"layer_norm_fn: {name} has shape {tuple(tensor.shape)}, expected {tuple(x.shape)}"
            )
    total, mask = _dropped(x if rowscale is None else x * rowscale.unsqueeze(-1), dropout_p)
    mask1 = None
    work = torch.promote_types(x.dtype, torch.float32)
    if x1 is not None:
        branch, mask1 = _dropped(x1, dropout_p)
        total = total.to(work) + branch
    if residual is not None:
        total = total.to(work) + residual
    kind = "rms" if is_rms_norm else "layer"
    outputs = [ops.norm(total, weight, bias, kind=kind, eps=eps).to(x.dtype)]
    if weight1 is not None:
        outputs.append(ops.norm(total, weight1, bias1, kind=kind, eps=eps).to(x.dtype))
    if prenorm:
        kept = residual.dtype if residual is not None else work if residual_in_fp32 else x.dtype
        outputs.append(total.to(kept))
    if return_dropout_mask:
        outputs += [mask, mask1]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """A branch with elements dropped and the others scaled up, and which were kept."""
    if p == 0:
        return x, None
    mask = torch.rand(x.shape, device=x.device) >= p
    return x * mask / (1 - p), mask


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` with `is_rms_norm`."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` followed by a linear layer; the sum comes second with `prenorm`."""
    y, total = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    y = linear(y, linear_weight, linear_bias)
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """An RMS norm that adds to a residual stream first.

    Args:
        hidden_size: Channels.
        eps: Added to the mean square.
        dropout_p: Probability that an element of the branch is dropped in training.
        device: Where the weight lives.
        dtype: Its type.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `(..., d)`, added to `residual` if given; with `prenorm` the sum comes second."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
