"""`mamba_ssm.models.mixer_seq_simple` and the parts it is made of: blocks, backbone, language model.

Module and parameter names are theirs, so their checkpoints load and their code finds what it looks for. Norms
and residual sums are `layer_norm_fn`, fused or not. Attention layers (`attn_layer_idx`) are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.checkpoints import locate, open_tensors, read_config
from mambakit.compat.generation import GenerationMixin, InferenceParams
from mambakit.compat.mamba import Mamba
from mambakit.compat.mamba2 import Mamba2
from mambakit.compat.mamba3 import Mamba3
from mambakit.compat.residual_norm import RMSNorm, layer_norm_fn
from mambakit.config import unknown

LAYERS: Mapping[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
"""Mixers by their name in `ssm_cfg`."""


@dataclasses.dataclass
class MambaConfig:
    """Their `config.json`.

    Attributes:
        d_model: Width of the residual stream.
        d_intermediate: Hidden channels of an MLP after every mixer, rounded up to 128s; 0 for none.
        n_layer: Blocks.
        vocab_size: Tokens.
        ssm_cfg: Arguments of the mixer; `layer` names it, Mamba-1 by default.
        attn_layer_idx: Only empty.
        attn_cfg: Says nothing without attention layers.
        rms_norm: RMS norm instead of layer norm.
        residual_in_fp32: Keep the residual stream in float32.
        fused_add_norm: Which kernels theirs uses; the result is the same.
        pad_vocab_size_multiple: The vocabulary is rounded up to a multiple of this.
        tie_embeddings: Use the embedding as the head's weight.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class GatedMLP(nn.Module):
    """`fc2(y * activation(gate))` with `y, gate` from `fc1`.

    Args:
        in_features: Channels in.
        hidden_features: Hidden channels, rounded up; `8/3` of `in_features` by default.
        out_features: Channels out; as many as in by default.
        activation: Of the gate.
        bias: Whether the projections have biases.
        multiple_of: Hidden channels are rounded up to a multiple of this.
        device: Where the parameters live.
        dtype: Their type.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, 2 * hidden, **made)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


class Block(nn.Module):
    """Add, then norm, then mixer (and again for an MLP): the stream and the last branch travel apart.

    Args:
        dim: Width of the residual stream.
        mixer_cls: Makes the mixer from the width.
        mlp_cls: Makes the MLP from the width; `nn.Identity` for none.
        norm_cls: Makes a norm from the width.
        fused_add_norm: Which kernels theirs uses; the result is the same.
        residual_in_fp32: Keep the residual stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add the last branch `(b, l, d)` to the stream and make the next one.

        Returns:
            The new branch and the stream, both `(b, l, d)`.
        """
        hidden_states, residual = self._normed(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._normed(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _normed(self, norm: nn.Module, branch: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_and_norm(norm, branch, residual, self.residual_in_fp32)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Make the mixer's empty states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_and_norm(
    norm: nn.Module, branch: Tensor, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of stream plus branch, in the type of the norm's weight, and the stream."""
    y, residual = layer_norm_fn(
        branch,
        norm.weight,
        norm.bias,
        residual,
        eps=norm.eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=isinstance(norm, RMSNorm),
    )
    return y.to(norm.weight.dtype), residual


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: Mapping[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Make block number `layer_idx`; the other arguments are those of `MambaConfig`.

    Raises:
        ValueError: An unknown `layer` in `ssm_cfg`.
        NotImplementedError: An attention layer.
    """
    made = {"device": device, "dtype": dtype}
    if attn_layer_idx:
        raise NotImplementedError(
            f"attn_layer_idx is {attn_layer_idx}, expected []: no attention layers here"
        )
    settings = dict(ssm_cfg or {})
    name = settings.pop("layer", "Mamba1")
    if name not in LAYERS:
        raise ValueError(f"ssm_cfg: {unknown('layer', name, LAYERS)}")
    norm = RMSNorm if rms_norm else nn.LayerNorm
    return Block(
        d_model,
        lambda dim: LAYERS[name](dim, **settings, layer_idx=layer_idx, **made),
        nn.Identity if d_intermediate == 0 else lambda dim: GatedMLP(dim, d_intermediate, dim, **made),
        norm_cls=lambda dim: norm(dim, eps=norm_epsilon, **made),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm; arguments as in `MambaConfig`, and

    Args:
        initializer_cfg: `initializer_range` of the embedding (0.02), `rescale_prenorm_residual` (true),
            `n_residuals_per_layer`.

    Raises:
        ValueError: An unknown `layer`.
        NotImplementedError: Attention layers.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                number,
                device,
                dtype,
            )
            for number in range(n_layer)
        )
        norm = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm(d_model, eps=norm_epsilon, device=device, dtype=dtype)
        branches = 1 if d_intermediate == 0 else 2
        _initialise(self, n_layer, **{"n_residuals_per_layer": branches, **(initializer_cfg or {})})

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, ...]]:
        """Make the empty states of all layers, by number."""
        made = {"dtype": dtype, **kwargs}
        return {
            n: layer.allocate_inference_cache(batch_size, max_seqlen, **made)
            for n, layer in enumerate(self.layers)
        }

    def forward(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> Tensor:
        """Activations `(b, l, d_model)` of tokens `(b, l)`; `mixer_kwargs` go to every mixer."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_and_norm(self.norm_f, hidden_states, residual, self.residual_in_fp32)[0]


def _initialise(
    model: nn.Module,
    n_layer: int,
    n_residuals_per_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
) -> None:
    """Start a backbone: embedding, biases, and GPT-2's division of what writes to the residual stream."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            if not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class CausalLMOutput(NamedTuple):
    """What a language model returns.

    Attributes:
        logits: `(b, l, v)`.
    """

    logits: Tensor


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """Their language model.

    Args:
        config: Its settings.
        initializer_cfg: As for `MixerModel`.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        ValueError: An unknown `layer`.
        NotImplementedError: Attention layers.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab_size,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the embedding the head's weight, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, ...]]:
        """Make the empty states of all layers, by number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Score the next token after every position, or after the last few.

        Args:
            input_ids: Tokens `(b, l)`.
            position_ids: Say nothing: no layer has positions.
            inference_params: Where the sequences stand; states in it are overwritten.
            num_last_tokens: Score only these last positions; 0 scores all.
            **mixer_kwargs: Go to every mixer, such as `seq_idx`.

        Returns:
            `logits` `(b, l, v)`.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Load a checkpoint in their layout, from a folder or the hub, safetensors or `pytorch_model.bin`.

        Raises:
            CheckpointError: Nothing there, or a damaged file.
            RuntimeError: Tensors that are missing, superfluous or of another shape.
        """
        model = cls(
            MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs
        )
        found = load_state_dict_hf(pretrained_model_name)
        if model.config.tie_embeddings:
            found.setdefault("lm_head.weight", found.get("backbone.embedding.weight"))
        model.load_state_dict(found)
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write `pytorch_model.bin` and `config.json` as theirs does."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        text = json.dumps(dataclasses.asdict(self.config), indent=4)
        (folder / "config.json").write_text(text, encoding="utf-8")


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The `config.json` of a folder or of a repository of the hub."""
    return read_config(locate(model_name))


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a folder or of a repository of the hub, in a type and place if asked for."""
    with open_tensors(locate(model_name)) as tensors:
        return {name: tensors[name].to(device=device, dtype=dtype) for name in tensors}
