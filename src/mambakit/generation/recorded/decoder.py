"""A decoding step recorded as one CUDA graph over the tensors of a `State`.

A graph repeats what was recorded on the same addresses: the token goes in through one tensor, logits come out
of another, and every layer overwrites its own part of the state in place, where the recording left it. The
first step on a state it has not seen runs normally and prepares what kernels and libraries keep, the second
is recorded, from then on they are replayed. So a state that changes with every step (as in beam search with
`State.select`) simply decodes as fast as the model's forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambakit.generation.recorded.fused import FusedForward
from mambakit.layers.mixer import State
from mambakit.models.language import LanguageModel
from mambakit.ops.dispatch import is_forced

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RecordedDecoder:
    """Decodes with a language model on a GPU, one recorded step per token.

    The model must be in evaluation mode. A recording reads the parameters where they lie: it follows changes
    in place, and needs a new decoder after `model.to(...)` or when layers are replaced.

    Args:
        model: A language model on a CUDA device whose state keeps its size.
        fused: Whether Mamba blocks run in fewer kernels of their own; by default where they can.
        overlap: Let a fused kernel start while the one before it ends (compute capability 9.0 on).

    Raises:
        ValueError: A model that cannot be recorded, or not be fused where that is asked for, with the reason.

    Attributes:
        fused: Whether Mamba blocks run in kernels of their own.
        is_recorded: Whether the last step was replayed.
    """

    def __init__(self, model: LanguageModel, *, fused: bool | None = None, overlap: bool = True) -> None:
        reason = self.supports(model)
        if reason is not None:
            raise ValueError(f"this model's decoding cannot be recorded: {reason}")
        if fused is None:  # a forced backend is meant to be seen at work
            fused = not is_forced() and FusedForward.unsupported(model) is None
        self.fused = fused
        self._forward = FusedForward(model, overlap=overlap) if self.fused else _ordinary(model)
        self._device = model.embedding.weight.device
        self._vocab_size = model.config.vocab_size
        # A graph must never read freed memory, whatever becomes of the model.
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self._leaves: list[weakref.ref[Tensor]] = []
        self._tokens = torch.empty(0, dtype=torch.int64, device=self._device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self.is_recorded = False

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Say why a model cannot be recorded, or `None`.

        Args:
            model: Any model.

        Returns:
            The first reason.
        """
        if not isinstance(model, LanguageModel):
            return f"it takes a LanguageModel, not {type(model).__name__}"
        device = model.embedding.weight.device
        if device.type != "cuda":
            return f"it takes models on a CUDA device, not on {device.type!r}"
        for name, parameter in model.named_parameters():
            if parameter.device != device:
                return f"{name} is on {parameter.device}, not on {device}"
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has hooks, which a recording would pass by"
        return _read_on_the_host(model)

    @staticmethod
    def unsupported_state(model: LanguageModel, state: State, batch: int) -> str | None:
        """Say why a step over a state could not be recorded, or `None`.

        Args:
            model: A model that can be recorded.
            state: Where its sequences stand.
            batch: Number of sequences.

        Returns:
            The first reason.
        """
        leaves = dict(state.tensors())
        device = model.embedding.weight.device
        for name, like in model.init_state(1, device="meta").tensors():
            if name not in leaves:
                return f"the state has no {name!r}: it is not one of this model"
            found, expected = leaves[name], (batch, *like.shape[1:])
            if found.shape != expected or found.device != device:
                return (
                    f"the state's {name} is {tuple(found.shape)} on {found.device}, "
                    f"expected {expected} on {device}"
                )
        return None

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, out: Tensor | None = None) -> Tensor:
        """Advance every sequence by one token.

        Args:
            tokens: Token numbers `(b,)`, integers, on the model's device. They are not looked at on the host:
                a number outside the vocabulary gives logits of NaN (fused) or the embedding's own error.
            state: Where the sequences stand, from the model's `init_state`; overwritten in place.
            out: Where to write the logits `(b, v)`; new memory by default.

        Returns:
            Logits of the next token `(b, v)`, in the model's type or that of `out`.

        Raises:
            ValueError: Tokens of another shape, type or device, `out` of another shape, or a state that does
                not fit.
        """
        if (
            tokens.dim() != 1
            or len(tokens) == 0
            or tokens.dtype not in _INTEGERS
            or tokens.device != self._device
        ):
            raise ValueError(
                f"tokens is {tuple(tokens.shape)} {tokens.dtype} on {tokens.device}, "
                f"expected integers (b,), b >= 1, on {self._device}"
            )
        if out is not None and out.shape != (len(tokens), self._vocab_size):
            raise ValueError(f"out has shape {tuple(out.shape)}, expected {(len(tokens), self._vocab_size)}")
        with torch.cuda.device(self._device):
            logits = self._step(tokens, state)
        return logits.clone() if out is None else out.copy_(logits)

    def _step(self, tokens: Tensor, state: State) -> Tensor:
        seen = self._is_bound(state, len(tokens))
        if not seen:
            self._bind(state, tokens)
        self._tokens.copy_(tokens)
        if seen and self._graph is None:
            self._record(state)
        self.is_recorded = self._graph is not None
        if self._graph is None:
            return self._normally(state)
        self._graph.replay()
        return self._logits

    def _is_bound(self, state: State, batch: int) -> bool:
        """Whether this is the state of the step before, tensor by tensor."""
        tensors = [tensor for _, tensor in state.tensors()]
        return (
            len(self._tokens) == batch
            and len(tensors) == len(self._leaves)
            and all(leaf() is tensor for leaf, tensor in zip(self._leaves, tensors, strict=True))
        )

    def _bind(self, state: State, tokens: Tensor) -> None:
        """Forget what was recorded, and remember which state comes."""
        for name, tensor in state.tensors():
            if tensor.device != self._device or (tensor.dim() and len(tensor) != len(tokens)):
                raise ValueError(
                    f"the state's {name} is {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {len(tokens)} rows on {self._device}"
                )
        self._graph, self._logits = None, None
        # Weakly: a decoder that is kept must not keep gigabytes of states with it.
        self._leaves = [weakref.ref(tensor) for _, tensor in state.tensors()]
        if len(self._tokens) != len(tokens):
            with torch.inference_mode(False):  # later steps may be outside of it
                self._tokens = torch.empty(len(tokens), dtype=torch.int64, device=self._device)

    def _normally(self, state: State) -> Tensor:
        # On the stream of the recording, which asks for libraries that are warm there.
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits = self._forward(self._tokens, state)
        torch.cuda.current_stream().wait_stream(self._stream)
        return logits

    def _record(self, state: State) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile; only this one is recorded.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._logits = self._forward(self._tokens, state)
        self._graph = graph


def _ordinary(model: LanguageModel) -> Callable[[Tensor, State], Tensor]:
    """The model's own forward for one token of each sequence."""
    return lambda tokens, state: model(tokens.unsqueeze(1), state)[:, -1]


def _read_on_the_host(model: LanguageModel) -> str | None:
    """Name what a model's state keeps on the CPU, or None.

    What lies there is read by the host, as attention reads how many tokens its cache holds, and decides which
    kernels are started: a recording would repeat one decision for ever.
    """
    for name, tensor in model.init_state(1, device="meta").tensors():
        if tensor.device.type == "cpu":
            block, _, leaf = name.partition(".")
            mixer = model.backbone.blocks[int(block)].mixer
            return (
                f"block {block} is {type(mixer).__name__}, whose state's {leaf!r} is read on the host; "
                "a recording repeats what it has seen"
            )
    return None
