"""Linear layers whose weights are kept as small integers, for models that would not fit otherwise.

    int8  integers in [-127, 127], one float32 scale per output channel:         1 byte a weight
    int4  integers in [-8, 7], one bfloat16 scale per output channel and 64 inputs: 0.53 bytes

A layer makes its weight anew whenever it is used, in the type in which the model computes, and forgets it:
nothing else about the model changes, on any device, and gradients pass through to what comes before. Norms,
convolutions, recurrences, embeddings (a head that is tied to one included) and routers keep their precision.
The rounding is that of the decode engine, which continues such models with the same integers.

Source: rounding to the nearest, per channel, as in Dettmers et al., "LLM.int8()" (2208.07339), section 2.1;
int4 scales of the least square error among a few: Nagel et al. (2106.08295), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.config import unknown
from mambakit.layers.moe import ExpertLinear

RoundedForm = Literal["int8", "int4"]
ROUNDED_FORMS: tuple[RoundedForm, ...] = get_args(RoundedForm)
GROUP = 64
"""Inputs that share a scale in int4."""
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""int4: a group's largest number becomes -8 at the first; with a smaller scale it is cut off at that, and all
others are rounded more finely."""
_BLOCK = 1 << 20  # weights that are rounded at a time
_ROUTERS = ("router",)  # a token's experts hang on small differences


def round_weight(weight: Tensor, form: RoundedForm) -> tuple[Tensor, Tensor]:
    """Round a weight to integers.

    Args:
        weight: `(..., rows, columns)`, floating point.
        form: `int8` or `int4`.

    Returns:
        Integers, int8 `(..., rows, columns)` or, two to a byte, uint8 `(..., rows, 32 groups)`: columns i and
        i + 32 of each 64; and scales, float32 `(..., rows)` or bfloat16 `(..., rows, groups)`. A row or group
        with a number that is not finite has a scale that is not.

    Raises:
        ValueError: An unknown form.
    """
    if form not in ROUNDED_FORMS:
        raise ValueError(unknown("form", form, ROUNDED_FORMS))
    rows = weight.detach().flatten(0, -2)
    size = max(1, _BLOCK // rows.shape[1])
    pairs = [_ROUND[form](block.float()) for block in rows.split(size)]
    integers, scales = (
        torch.cat(parts).unflatten(0, weight.shape[:-1]) for parts in zip(*pairs, strict=True)
    )
    return integers, scales


def restore_weight(integers: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The numbers that rounded weights stand for.

    Args:
        integers: As from `round_weight`, whose type tells the form.
        scales: Their scales.
        columns: Columns of the weight.
        dtype: Type of the result; the product of integer and scale is taken in float32.

    Returns:
        Weights `(..., rows, columns)`.
    """
    if integers.dtype == torch.int8:
        return (integers.float() * scales.unsqueeze(-1)).to(dtype)
    bytes_ = integers.unflatten(-1, (-1, GROUP // 2))  # (..., rows, groups, 32)
    numbers = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).float() - 8
    return (numbers * scales.float().unsqueeze(-1)).flatten(-2)[..., :columns].to(dtype)


def _round_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (rows * inverse[:, None]).round().clamp(-127, 127).nan_to_num().to(torch.int8), scales


def _round_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # with its sign
    best = torch.zeros_like(extreme, dtype=torch.bfloat16)
    least = torch.full_like(extreme, torch.inf, dtype=torch.float64)
    for shrink in _SHRINK:
        scale = (extreme * (shrink / -8)).bfloat16()
        error = (_to_int4(groups, scale) * scale.float() - groups).double().square().sum(-1, keepdim=True)
        better = (error < least) & (scale != 0)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    best = torch.where(groups.isfinite().all(-1, keepdim=True), best, torch.nan)
    numbers = (_to_int4(groups, best).nan_to_num() + 8).to(torch.uint8)
    lower, upper = numbers.chunk(2, dim=-1)
    return (lower | upper << 4).flatten(1), best.squeeze(-1)


def _to_int4(groups: Tensor, scale: Tensor) -> Tensor:
    scale = scale.float()
    return (groups * torch.where(scale != 0, 1 / scale, 0)).round().clamp(-8, 7)


_ROUND = {"int8": _round_int8, "int4": _round_int4}


class Rounded(nn.Module):
    """The weight of one linear map, or of one for each expert, as integers.

    Args:
        shape: Shape of the weight, `(..., d_out, d_in)`.
        form: `int8` or `int4`.
        device: Where it lives.
        dtype: Type in which the weight is used.

    Raises:
        ValueError: An unknown form.

    Attributes:
        form: The form.
        dtype: Type in which the weight is used; `to(dtype)` changes it, and no integer.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        form: RoundedForm,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in ROUNDED_FORMS:
            raise ValueError(unknown("form", form, ROUNDED_FORMS))
        self.form, self.shape = form, tuple(shape)
        *rows, columns = shape
        groups = -(-columns // GROUP)
        if form == "int8":
            integers = torch.zeros(shape, dtype=torch.int8, device=device)
            scales = torch.zeros(rows, dtype=torch.float32, device=device)
        else:
            integers = torch.zeros((*rows, groups * GROUP // 2), dtype=torch.uint8, device=device)
            scales = torch.zeros((*rows, groups), dtype=torch.bfloat16, device=device)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def weight(self) -> Tensor:
        """The weight `(..., d_out, d_in)`, made anew."""
        return self.restored(self.dtype)

    @property
    def example(self) -> Tensor:
        """An empty tensor on the device and of the type in which the weight is used."""
        return torch.empty(0, dtype=self.dtype, device=self.integers.device)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight `(..., d_out, d_in)` in some type, made anew."""
        return restore_weight(self.integers, self.scales, self.shape[-1], dtype)

    def round_(self, weight: Tensor) -> None:
        """Take a weight `(..., d_out, d_in)`, rounded."""
        self.integers, self.scales = round_weight(weight, self.form)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.shape}, {self.form}"

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


class RoundedLinear(Rounded):
    """`y = x W' + b` with a rounded weight.

    Args:
        d_in: Channels in.
        d_out: Channels out.
        form: `int8` or `int4`.
        bias: Whether there is a bias, which keeps its precision.
        device: Where the layer lives.
        dtype: Type in which it computes.

    Raises:
        ValueError: An unknown form.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        form: RoundedForm,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((d_out, d_in), form, device=device, dtype=dtype)
        self.in_features, self.out_features = d_in, d_out
        empty = torch.zeros(d_out, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map.

        Args:
            x: Activations `(..., d_in)`.

        Returns:
            Activations `(..., d_out)`.
        """
        return F.linear(x, self.weight, self.bias)


class RoundedExperts(Rounded):
    """A rounded linear map for each expert; only those that have tokens are restored.

    Args:
        n_experts: Experts `e`.
        d_in: Channels in.
        d_out: Channels out.
        form: `int8` or `int4`.
        device: Where the layer lives.
        dtype: Type in which it computes.

    Raises:
        ValueError: An unknown form.
    """

    def __init__(
        self,
        n_experts: int,
        d_in: int,
        d_out: int,
        form: RoundedForm,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((n_experts, d_out, d_in), form, device=device, dtype=dtype)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply each expert to its rows; a batch `(b, l, d)` is taken apart by `MoE`.

        Args:
            x: Tokens `(t, d_in)`, those of expert 0 first.
            counts: How many tokens each expert has `(e,)`, integers.

        Returns:
            Tokens `(t, d_out)`.
        """
        ys = []
        for expert, piece in enumerate(x.split(counts.tolist())):
            if len(piece):
                one = (self.integers[expert], self.scales[expert], self.shape[-1], self.dtype)
                ys.append(F.linear(piece, restore_weight(*one)))
        return torch.cat(ys) if ys else x.new_zeros(0, self.shape[1])


def roundable(model: nn.Module) -> Iterator[tuple[str, nn.Linear | ExpertLinear]]:
    """The linear layers of a model that `quantise` replaces, by name.

    Not routers, and not a head whose weight is the embedding's. A layer with several names, as in shared
    blocks, comes once for each.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules(remove_duplicate=False):
        known = type(module) is nn.Linear or type(module) is ExpertLinear
        if known and name.rpartition(".")[2] not in _ROUTERS and id(module.weight) not in tied:
            yield name, module


def quantise(model: nn.Module, form: RoundedForm) -> nn.Module:
    """Round the weights of a model's linear layers, one after the other, in place.

    Args:
        model: Any model; on the `meta` device only its structure changes.
        form: `int8` or `int4`.

    Returns:
        The same model.

    Raises:
        ValueError: An unknown form, or a model that has rounded weights already.
    """
    if form not in ROUNDED_FORMS:
        raise ValueError(f"quantize: {unknown('form', form, ROUNDED_FORMS)}")
    before = form_of(model)
    if before is not None:
        raise ValueError(f"quantize: the model's weights are {before} already")
    # Names, not the layers: each is to be freed when its turn has come.
    names = [(name, id(layer)) for name, layer in roundable(model)]
    made: dict[int, Rounded] = {}
    for name, which in names:
        if which not in made:
            made[which] = _like(model.get_submodule(name), form)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[which])
    return model


def _like(layer: nn.Linear | ExpertLinear, form: RoundedForm) -> Rounded:
    """A layer with the weight of another one, rounded."""
    made = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if type(layer) is nn.Linear:
        sizes = (layer.in_features, layer.out_features, form)
        new = RoundedLinear(*sizes, bias=layer.bias is not None, **made)
        new.bias = layer.bias
    else:
        experts, d_out, d_in = layer.weight.shape
        new = RoundedExperts(experts, d_in, d_out, form, **made)
    if layer.weight.device.type != "meta":
        new.round_(layer.weight)
    return new.train(layer.training)


def form_of(model: nn.Module) -> RoundedForm | None:
    """The form of a model's rounded weights, or `None` where it has none."""
    return next((module.form for module in model.modules() if isinstance(module, Rounded)), None)
