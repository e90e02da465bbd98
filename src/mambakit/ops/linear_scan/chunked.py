"""The linear recurrence in two levels: all chunks at once, then from chunk to chunk.

Cut the sequence into `c` chunks of `q` tokens with `q c >= l`. A loop over the `q` positions advances every
chunk together from a zero state; a second loop over the `c` chunks carries the true states; one
multiply-add corrects every token. That is about `2 sqrt(l)` steps of vectorised work, each element touched
a fixed number of times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambakit.ops.linear_scan import reference
from mambakit.ops.shapes import same_document


def linear_scan(
    a: Tensor, u: Tensor, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two-level form of `mambakit.ops.linear_scan`."""
    batch, length, *rest = u.shape
    if length == 1:
        return reference.linear_scan(a, u, initial_state, seq_idx)
    if seq_idx is not None:
        # A factor of exactly zero forgets: nothing of another document, not even a rounding, gets through.
        keep = same_document(seq_idx).view(batch, length, *[1] * len(rest))
        a = torch.where(keep, a, torch.zeros_like(a))
    q = 2 ** math.ceil(math.log2(length) / 2)
    c = -(-length // q)
    a_positions = _split(a, c, q, 1.0).unbind(2)  # q x (b c ...)
    u_positions = _split(u, c, q, 0.0).unbind(2)

    product, state = a_positions[0], u_positions[0]
    products, states = [product], [state]
    for a_q, u_q in zip(a_positions[1:], u_positions[1:], strict=True):
        product = product * a_q
        state = torch.addcmul(u_q, a_q, state)
        products.append(product)
        states.append(state)

    # Carry the state entering each chunk; the last chunk's padding (a = 1, u = 0) passes its state through.
    entering = torch.zeros_like(u[:, 0]) if initial_state is None else initial_state
    entries = []
    for chunk_product, chunk_state in zip(product.unbind(1), state.unbind(1), strict=True):
        entries.append(entering)
        entering = torch.addcmul(chunk_state, chunk_product, entering)
    h = torch.addcmul(torch.stack(states, 2), torch.stack(products, 2), torch.stack(entries, 1).unsqueeze(2))
    return h.reshape(batch, c * q, *rest)[:, :length], entering


def _split(tensor: Tensor, c: int, q: int, fill: float) -> Tensor:
    """Pad `(b, l, ...)` to whole chunks and fold it to `(b, c, q, ...)`."""
    batch, length, *rest = tensor.shape
    if c * q > length:
        padding = tensor.new_full((batch, c * q - length, *rest), fill)
        tensor = torch.cat([tensor, padding], dim=1)
    return tensor.reshape(batch, c, q, *rest)
