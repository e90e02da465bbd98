"""One token through a language model in few kernels: what a recorded step records where it can.

A block is a chain of products with vectors, each of which needs all of the one before it: Mamba-1 takes four
kernels (`in_proj` with the norm before it and the convolution after it; `x_proj`; `dt_proj` with the
recurrence and the gate; `out_proj`, which adds to the residual stream), Mamba-2 three; a gated MLP leaves its
activation to PyTorch. With more than eight sequences products are kernels by themselves, ours or PyTorch's,
and everything between them is one kernel each. Blocks of another kind run by their own forward in between.
The numbers are those of the model's forward up to the order of sums: all roundings are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambakit.generation.recorded.kernels import (
    COUNTERS,
    MOST_STATES,
    MOST_TAPS,
    Conv,
    Launcher,
    Norm,
    Parts,
)
from mambakit.generation.settings import unknown_setting
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.mamba1 import Mamba1
from mambakit.layers.mamba2 import Mamba2
from mambakit.layers.mixer import Mixer, State
from mambakit.layers.mlp import ACTIVATIONS, GatedMLP
from mambakit.layers.norm import GatedRMSNorm, RMSNorm
from mambakit.layers.selective_ssm import SelectiveSSM
from mambakit.models.backbone import Backbone
from mambakit.models.block import Block
from mambakit.models.language import LanguageModel
from mambakit.ops import cuda

# Parts whose parameters are read here: they must be exactly these, and nobody may listen.
_PARTS = {
    Mamba1: (nn.Linear, nn.Identity, CausalConv1d, SelectiveSSM, Mamba1),
    Mamba2: (nn.Linear, CausalConv1d, GatedRMSNorm, Mamba2),
    GatedMLP: (nn.Linear, GatedMLP),
}
_SCALARS = ("A_log", "D", "dt_bias")


class FusedForward:
    """One token of every sequence through a model, in few kernels.

    It reads the model's parameters where they are, so it follows them when they change in place.

    Args:
        model: A language model on a GPU.
        overlap: Let a kernel start, and ask for its weights, while the one before it ends.

    Raises:
        ValueError: A model of which nothing can be fused, with the reason.
    """

    def __init__(self, model: LanguageModel, *, overlap: bool = True) -> None:
        reason = self.unsupported(model)
        if reason is not None:
            raise ValueError(f"this model cannot be fused: {reason}")
        self.model, self.overlap = model, overlap
        weight = model.embedding.weight
        self._fused = [unsupported_block(block, weight) is None for block in model.backbone.blocks]
        last = model.backbone.norm_f, model.lm_head
        self._fused_head = (
            _is_plain(last[0], RMSNorm)
            and _is_plain(last[1], nn.Linear)
            and all(
                _unlike(p, weight.dtype, weight.device) is None for part in last for p in part.parameters()
            )
        )
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=weight.device)
        self._widest = max(part.in_features for part in model.modules() if isinstance(part, nn.Linear))

    @staticmethod
    def unsupported(model: nn.Module) -> str | None:
        """Say why nothing of a model can be fused, or `None`.

        Args:
            model: Any model.

        Returns:
            The first block's reason if no block can be.
        """
        if type(model) is not LanguageModel:
            return f"it takes a LanguageModel, not {type(model).__name__}"
        if type(model.backbone) is not Backbone:
            return f"it takes a Backbone, not {type(model.backbone).__name__}"
        if (setting := unknown_setting(model.config)) is not None:
            return f"the model has {setting}, of which it knows nothing"
        weight = model.embedding.weight
        if reason := cuda.runs_on(weight.device):
            return f"it {reason}"
        if not _is_plain(model.embedding, nn.Embedding) or not weight.is_contiguous():
            return f"its embedding is {type(model.embedding).__name__}, has hooks or is not contiguous"
        if weight.dtype not in cuda.TYPES:
            return f"it takes float32, bfloat16 and float16, not {weight.dtype}"
        reasons = [unsupported_block(block, weight) for block in model.backbone.blocks]
        return None if None in reasons else f"block 0: {reasons[0]}"

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        """Advance every sequence by one token.

        Args:
            tokens: Token numbers `(b,)`, int64.
            state: Where the sequences stand, overwritten in place.

        Returns:
            Logits `(b, v)` in the model's type.
        """
        model, backbone = self.model, self.model.backbone
        weight = model.embedding.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        residual = wide if backbone.config.residual_in_fp32 else weight.dtype
        launcher = Launcher(weight.device, weight.dtype, residual, self.overlap, self._counters)
        run = _Step(launcher, launcher.embed(tokens, weight), self._widest)
        for number, block in enumerate(backbone.blocks):
            own = state[str(number)]
            if self._fused[number] and _unfit(own) is None:
                _STEPS[type(block.mixer)](run, block, own)
            else:
                run.ordinary(block, own)
        if self._fused_head:
            return run.linear(model.lm_head, backbone.norm_f)
        features = backbone.norm_f(run.settled()).to(backbone.norm_f.weight.dtype)
        return model.lm_head(features)


def unsupported_block(block: Block, like: Tensor) -> str | None:
    """Say why a block cannot be fused, or `None`.

    Args:
        block: Any block.
        like: A tensor of the type and on the device of all weights.

    Returns:
        A reason.
    """
    mixer = block.mixer
    if type(mixer) not in _PARTS:
        return f"{type(mixer).__name__} has no fused kernels"
    if (setting := unknown_setting(mixer.config)) is not None:
        return f"it has {setting}, of which the kernels know nothing"
    for part, expected in ((block, Block), (block.norm, RMSNorm)):
        if not _is_plain(part, expected):
            return f"it is or holds {type(part).__name__}, not {expected.__name__}, or that has hooks"
    for name, module in mixer.named_modules():
        if not _is_plain(module, *_PARTS[type(mixer)]):
            return f"{name or 'the mixer'} is {type(module).__name__}, or has hooks"
    for name, parameter in block.named_parameters():
        expected = torch.float32 if name.rpartition(".")[2] in _SCALARS else like.dtype
        if reason := _unlike(parameter, expected, like.device):
            return f"{name} is {reason}"
    for size, most in (("d_conv", MOST_TAPS), ("d_state", MOST_STATES)):
        if getattr(mixer.config, size, 0) > most:
            return f"takes {size} up to {most}, not {getattr(mixer.config, size)}"
    return None


def _is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these types and nobody listens to it."""
    listened = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in types and not listened


def _unlike(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """What a parameter is if it is not what the kernels read, or None."""
    if parameter.dtype == dtype and parameter.device == device and parameter.is_contiguous():
        return None
    return f"{parameter.dtype} on {parameter.device}, expected {dtype} on {device}, contiguous"


def _unfit(state: State) -> str | None:
    """Why a block's state cannot be overwritten by the kernels, or None."""
    for name, tensor in state.tensors():
        if tensor.dtype not in cuda.TYPES or not tensor.is_contiguous():
            return f"{name} is {tensor.dtype} or not contiguous"
    return None


class _Step:
    """The residual stream on its way through the blocks.

    For larger batches a block's output stays beside the stream until the next norm, which adds it.
    """

    def __init__(self, launcher: Launcher, residual: Tensor, widest: int) -> None:
        self.launch, self.residual = launcher, residual
        self.branch: Tensor | Parts | None = None
        # Few sequences, whose activations fit into shared memory.
        self.few = launcher.takes_vectors(len(residual), widest)

    def settled(self) -> Tensor:
        """The residual stream with everything added."""
        if isinstance(self.branch, Parts):
            branch = self.branch.sums.sum(0)
            branch = branch if self.branch.bias is None else branch + self.branch.bias
            self.branch = branch.to(self.launch.dtype)
        if self.branch is not None:
            self.residual.add_(self.branch)
            self.branch = None
        return self.residual

    def ordinary(self, block: Block, state: State) -> None:
        """A block by its own forward."""
        self.residual = block(self.settled().unsqueeze(1), state).squeeze(1).contiguous()

    def linear(self, linear: nn.Linear, norm: RMSNorm | None = None, conv: Conv | None = None) -> Tensor:
        """A linear layer of the normalised residual stream, and a convolution of some of its outputs."""
        before = Norm(norm.weight, norm.eps)
        if self.few:
            return self.launch.linear(self.residual, linear.weight, linear.bias, norm=before, conv=conv)
        normed = self.launch.normalise(self.residual, before, self.branch)
        self.branch = None
        out = self.product(normed, linear)
        if conv is not None:
            self.launch.convolve(out, conv)
        return out

    def product(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """A linear layer of anything else."""
        if self.few:
            return self.launch.linear(x, linear.weight, linear.bias)
        if self.launch.takes_product(x, linear.weight):
            return self.launch.product(x, linear.weight, linear.bias)
        return nn.functional.linear(x, linear.weight, linear.bias)

    def add(self, y: Tensor, linear: nn.Linear, norm: Norm | None = None) -> None:
        """A block's last linear layer, added to the residual stream."""
        if self.few:
            self.launch.linear(y, linear.weight, linear.bias, norm=norm, add_to=self.residual)
            return
        y = y if norm is None else self.launch.normalise(y, norm)
        if self.launch.takes_product(y, linear.weight):
            self.branch = self.launch.product_in_parts(y, linear.weight, linear.bias)
        else:
            self.branch = nn.functional.linear(y, linear.weight, linear.bias)

    def mamba1(self, block: Block, state: State) -> None:
        """A Mamba-1 block."""
        mixer, ssm = block.mixer, block.mixer.ssm
        d, (rank, n, _) = mixer.out_proj.in_features, ssm.split
        conv = Conv(mixer.conv1d.weight, mixer.conv1d.bias, state["conv"])
        x, z = self.linear(mixer.in_proj, block.norm, conv).split(d, dim=1)
        dt, B, C = self.product(x, ssm.x_proj).split((rank, n, n), dim=1)
        weight = ssm.dt_proj.weight
        y = self.launch.scan(x, z, dt, B, C, weight, ssm.dt_bias, ssm.A_log, ssm.D, state["ssm"])
        self.add(y, mixer.out_proj)

    def mamba2(self, block: Block, state: State) -> None:
        """A Mamba-2 block."""
        mixer, config = block.mixer, block.mixer.config
        d, channels, _ = mixer.split
        conv = Conv(mixer.conv1d.weight, mixer.conv1d.bias, state["conv"], first=d)
        projected = self.linear(mixer.in_proj, block.norm, conv)
        width = config.ngroups * config.d_state
        columns = {"z": 0, "x": d, "B": 2 * d, "C": 2 * d + width, "dt": d + channels}
        gate_last = mixer.norm.norm_before_gate
        y = self.launch.heads(
            projected, columns, config.ngroups, mixer.dt_bias, mixer.A_log, mixer.D, config.dt_limit,
            state["ssm"], gate=not gate_last,
        )  # fmt: skip
        gate = projected[:, :d] if gate_last else None
        groups = d // (mixer.norm.group_size or d)
        self.add(y, mixer.out_proj, Norm(mixer.norm.weight, mixer.norm.eps, groups, gate))

    def mlp(self, block: Block, state: State) -> None:
        """A gated MLP."""
        mixer = block.mixer
        value, gate = self.linear(mixer.in_proj, block.norm).chunk(2, dim=1)
        self.add(value * ACTIVATIONS[mixer.config.activation](gate), mixer.out_proj)


_STEPS: dict[type[Mixer], Callable[[_Step, Block, State], None]] = {
    Mamba1: _Step.mamba1,
    Mamba2: _Step.mamba2,
    GatedMLP: _Step.mlp,
}
