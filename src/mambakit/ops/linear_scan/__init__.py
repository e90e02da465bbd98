"""Linear recurrence `h_t = a_t h_{t-1} + u_t`: the operator under every state space model.

Element-wise, real or complex. Selective scan is this recurrence with `a = exp(dt A)`, S4D with a constant
complex `a`; the chunk states of SSD obey it too. See MATH.md beside this file for the two-level form and the
derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.dispatch import Op
from mambakit.ops.linear_scan import chunked, reference

_op = Op("linear_scan", {"chunked": chunked, "reference": reference}, flops=lambda a, u, *_: 2 * u.numel())


def linear_scan(
    a: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the element-wise linear recurrence over a sequence.

    `h_t = a_t h_{t-1} + u_t`, with `h_{-1}` the initial state (zero by default). Where `seq_idx` changes,
    `h_{t-1}` counts as zero.

    Args:
        a: Decay factors `(b, l, ...)`, real or complex, dimensionless.
        u: Inputs `(b, l, ...)`, in the state's unit; same shape as `a`.
        initial_state: State before the first token `(b, ...)`; differentiable.
        state: The same, overwritten in place with the final state (inference); excludes `initial_state`.
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: `"chunked"` or `"reference"`; chosen automatically by default.

    Returns:
        All states `(b, l, ...)` in the promoted type of the inputs, and the final state `(b, ...)` in float32
        or wider (complex where they are); the recurrence runs in the latter.

    Raises:
        ValueError: Shapes that do not fit, an empty sequence, or a backend that cannot take the inputs.

    Source:
        Blelloch, "Prefix sums and their applications" (1990); Martin and Cundy, "Parallelizing linear
        recurrent neural nets over sequence length" (2018), section 2.
    """
    shapes.check("linear_scan", u=(u, "b l ..."), seq_idx=(seq_idx, "b l"))
    for name, tensor, expected in (
        ("a", a, u.shape),
        ("initial_state", initial_state, u[:, 0].shape),
        ("state", state, u[:, 0].shape),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"linear_scan: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}"
            )
    dtype = torch.promote_types(a.dtype, u.dtype)
    work = torch.promote_types(dtype, torch.float32)
    start = None if initial_state is None else initial_state.to(work)
    h, final = _op(a.to(work), u.to(work), start, seq_idx, state=state, backend=backend)
    return h.to(dtype), final
