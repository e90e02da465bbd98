"""The engine's Python side: what it can take, and one step."""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambakit.config import unknown
from mambakit.generation.engine import program
from mambakit.generation.engine.program import MIXERS, MOST_BATCH, STRUCT_BYTES, Args
from mambakit.generation.engine.weights import FORMS, Form
from mambakit.generation.settings import unknown_setting
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.mixer import State
from mambakit.layers.norm import GatedRMSNorm, RMSNorm
from mambakit.layers.quantised import RoundedLinear, form_of
from mambakit.layers.selective_ssm import SelectiveSSM
from mambakit.models.language import LanguageModel
from mambakit.ops import native

# Parts that the engine computes by itself: it reads their parameters, so they must be exactly these.
_PARTS = (nn.Linear, RoundedLinear, nn.Embedding, CausalConv1d, RMSNorm, GatedRMSNorm, SelectiveSSM, *MIXERS)
_FRAMES = (nn.ModuleList, nn.Identity, nn.Dropout)
_THREAD_BYTES = 32 << 10  # a phase is worth another thread for so many bytes of weights

_step = native.Kernel("decode_step", f"{len(Args._fields_)}q")


class DecodeEngine:
    """A language model packed for decoding on a CPU.

    The weights are copied as they are now: an engine does not follow a model that is trained further.

    Args:
        model: A language model of Mamba-1, Mamba-2 and gated MLP blocks on the CPU, in float32 or bfloat16.
        weights: How the linear layers' weights are kept: `float32`, `bfloat16` (computed with in float32),
            `int8` (a scale per output channel) or `int4` (one per 64 of its inputs). Everything else is
            float32.

    Raises:
        ValueError: An unknown form, or a model that the engine cannot take, with the reason.

    Attributes:
        weights: The form.
        weight_bytes: Bytes that a step reads, states aside.
    """

    def __init__(self, model: LanguageModel, weights: Form = "float32") -> None:
        if weights not in FORMS:
            raise ValueError(f"weights: {unknown('form', weights, FORMS)}")
        reason = self.supports(model)
        if reason is None:
            reason = self.unsupported_form(model, weights)
        if reason is not None:
            raise ValueError(f"the decode engine cannot take this model: {reason}")
        self.weights = weights
        self._program = program.build(model, weights)
        self._embedding = model.embedding.weight.detach().contiguous()
        self._vocab_size = model.config.vocab_size
        like = model.init_state(1)
        self._like = [like[block][name] for block, name in self._program.leaves]
        self._table = (ctypes.c_void_p * len(self._like))()
        self._bound: list[Tensor] = []
        self._batch = 0
        self._room = torch.empty(0, dtype=torch.uint8)
        self._threads = 0
        self._vnni = True  # where the processor has it
        self._lock = threading.Lock()

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Say why a model cannot be taken, or `None`.

        Args:
            model: Any model.

        Returns:
            The first reason.
        """
        if type(model) is not LanguageModel:
            return f"it takes a LanguageModel, not {type(model).__name__}"
        for number, block in enumerate(model.backbone.blocks):
            if type(block.mixer) not in MIXERS:
                known = ", ".join(mixer.__name__ for mixer in MIXERS)
                return f"block {number} is {type(block.mixer).__name__}; it takes {known}"
        configs = {"the model": model.config}
        configs |= {f"block {n}": block.mixer.config for n, block in enumerate(model.backbone.blocks)}
        for where, config in configs.items():
            if (setting := unknown_setting(config)) is not None:
                return f"{where} has {setting}, of which it knows nothing"
        for name, module in model.named_modules():
            reason = _unknown_part(name, module)
            if reason is not None:
                return reason
        for name, parameter in model.named_parameters():
            if not parameter.is_cpu:
                return f"{name} is on {parameter.device}, not on the CPU"
            if parameter.dtype not in native.DTYPES:
                dtype = str(parameter.dtype).removeprefix("torch.")
                return f"{name} is {dtype}; it takes float32 and bfloat16"
        return native.load().reason

    @staticmethod
    def unsupported_form(model: nn.Module, weights: Form) -> str | None:
        """Say why a model's weights cannot be kept in a form, or `None`.

        Args:
            model: Any model.
            weights: The form.

        Returns:
            The reason: weights that are rounded already are not rounded to other integers.
        """
        own = form_of(model)
        if own is None or weights not in ("int8", "int4") or weights == own:
            return None
        return f"its weights are {own} already, not to be made {weights}"

    @staticmethod
    def has_vnni() -> bool:
        """Whether integers are multiplied with VNNI instructions here, which are several times as fast."""
        library = native.load().library
        return library is not None and bool(library.mambakit_decode_has_vnni())

    @staticmethod
    def unsupported_state(model: LanguageModel, state: State, batch: int) -> str | None:
        """Say why an engine of this model could not continue a state, or `None`.

        Args:
            model: A model that the engine supports.
            state: Where its sequences stand.
            batch: Number of sequences.

        Returns:
            The first reason.
        """
        if batch > MOST_BATCH:
            return f"it takes up to {MOST_BATCH} sequences, not {batch}"
        leaves = dict(state.tensors())
        for name, like in model.init_state(1).tensors():
            if name not in leaves:
                return f"the state has no {name!r}: it is not one of this model"
            reason = _unfit(name, leaves[name], like, batch)
            if reason is not None:
                return reason
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self._program.weight_bytes

    def step(self, tokens: Tensor, state: State, out: Tensor | None = None) -> Tensor:
        """Advance every sequence by one token.

        Args:
            tokens: Token numbers `(b,)`, integers, 1 <= b <= 16.
            state: Where the sequences stand, from the model's `init_state`; overwritten in place.
            out: Where to write the logits `(b, v)`, float32; new memory by default.

        Returns:
            Logits of the next token `(b, v)`, float32.

        Raises:
            ValueError: Tokens of another shape or outside the vocabulary, more than 16 sequences, an `out`
                that is no such tensor, or a state of another model.
        """
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError(f"tokens is {tuple(tokens.shape)} {tokens.dtype}, expected (b,) integers")
        numbers = tokens.tolist()
        batch = len(numbers)
        if not 1 <= batch <= MOST_BATCH:
            raise ValueError(f"a step takes 1 to {MOST_BATCH} sequences, not {batch}")
        if min(numbers) < 0 or max(numbers) >= self._vocab_size:
            wrong = min(numbers) if min(numbers) < 0 else max(numbers)
            raise ValueError(f"token {wrong}, expected a number from 0 to {self._vocab_size - 1}")
        if out is None:
            out = torch.empty(batch, self._vocab_size)
        else:
            self._check_out(out, (batch, self._vocab_size))
        with self._lock:
            self._bind(state, batch)
            self._run((ctypes.c_int64 * batch)(*numbers), batch, out)
        return out

    @staticmethod
    def _check_out(out: Tensor, shape: tuple[int, int]) -> None:
        if out.shape != shape or out.dtype != torch.float32 or not (out.is_cpu and out.is_contiguous()):
            found = f"{tuple(out.shape)} {out.dtype} on {out.device}"
            raise ValueError(f"out is {found}, expected {shape} torch.float32 on the CPU, contiguous")

    def _bind(self, state: State, batch: int) -> None:
        """Fill the table of the state's tensors, unless it holds those of the last step."""
        try:
            tensors = [state[block][name] for block, name in self._program.leaves]
        except KeyError as error:
            raise ValueError(f"the state has no {error.args[0]!r}: it is not one of this model") from None
        if self._batch == batch and all(map(operator.is_, tensors, self._bound)):
            return
        for i, (tensor, leaf) in enumerate(zip(tensors, self._like, strict=True)):
            reason = _unfit(".".join(self._program.leaves[i]), tensor, leaf, batch)
            if reason is not None:
                raise ValueError(reason)
            self._table[i] = tensor.data_ptr()
        self._bound, self._batch = tensors, batch

    def _run(self, numbers: Sequence[int], batch: int, out: Tensor) -> None:
        this = self._program
        threads = self._thread_count()
        _step(
            *(ctypes.addressof(this.phases), len(this.phases), ctypes.addressof(numbers)),
            *(self._embedding.data_ptr(), self._embedding.dtype == torch.bfloat16, self._embedding.shape[1]),
            *(this.residual.pointer, this.residual.stride, ctypes.addressof(self._table)),
            *(out.data_ptr(), out.stride(0), self._room_pointer(threads), this.widest),
            *(batch, threads, self._vnni, STRUCT_BYTES),
        )

    def _thread_count(self) -> int:
        """As many of PyTorch's threads as the weights of a phase are worth."""
        worth = self.weight_bytes // (len(self._program.phases) * _THREAD_BYTES)
        return max(1, min(torch.get_num_threads(), worth))

    def _room_pointer(self, threads: int) -> int:
        """Working memory for so many threads, at a multiple of 64."""
        if threads > self._threads:
            needed = native.load().library.mambakit_decode_room
            needed.argtypes, needed.restype = [ctypes.c_int64] * 3, ctypes.c_int64
            size = needed(self._program.widest, len(self._program.phases), threads)
            self._room, self._threads = torch.zeros(size + 64, dtype=torch.uint8), threads
        return -(-self._room.data_ptr() // 64) * 64


def _unfit(name: str, tensor: Tensor, like: Tensor, batch: int) -> str | None:
    """Why a tensor of the state is not what the engine overwrites."""
    expected = (batch, *like.shape[1:])
    if tensor.shape != expected or tensor.dtype != like.dtype or not tensor.is_cpu:
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        return f"the state's {name} is {found}, expected {expected} {like.dtype} on the CPU"
    return None if tensor.is_contiguous() else f"the state's {name} is not contiguous"


def _unknown_part(name: str, module: nn.Module) -> str | None:
    """Why a part of a language model may compute something else than the engine would."""
    where = name or "the model"
    if type(module).__module__.startswith("mambakit.models") or type(module) in _FRAMES:
        known = True
    else:
        known = type(module) in _PARTS
    if not known:
        return f"{where} is {type(module).__name__}, of which it knows nothing"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return f"{where} has hooks, which it would pass by"
    return None
