"""`mamba_ssm.utils.generation`: inference parameters and a decoding loop, on any device.

Differs from theirs where theirs is wrong: a row that has ended is filled with the end token, generation stops
once every row has ended, min-p measures against the most likely token, and sampling needs no CUDA.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from mambakit.generation import Sampler, Sampling


@dataclasses.dataclass
class InferenceParams:
    """Where a batch of sequences stands.

    Attributes:
        max_seqlen: Tokens that the sequences may have.
        max_batch_size: Rows of the batch.
        seqlen_offset: Tokens seen so far; 0 starts every layer's state afresh.
        batch_size_offset: Only 0.
        key_value_memory_dict: States by layer number; a layer makes its own where it finds none.
        lengths_per_sample: Kept for their code; nothing here reads it.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin other sequences; states stay where they are and are overwritten."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclasses.dataclass
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate`.

    Attributes:
        sequences: Prompts and new tokens `(b, l)`.
        scores: Logits of every new token `(b, v)`, if asked for.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class Streamer(Protocol):
    """Takes tokens as they come, as transformers' `TextStreamer` does."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then new tokens."""

    def end(self) -> None:
        """Nothing more comes."""


def states_of(
    layer: Any, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
) -> tuple[Tensor, ...]:
    """The states of a layer: those it has under its number, else new ones; emptied at the start.

    Raises:
        ValueError: The layer has no number, or states of another batch size.
        NotImplementedError: A `batch_size_offset`.
    """
    if layer.layer_idx is None:
        raise ValueError(f"{type(layer).__name__}: layer_idx is None, expected a number to keep states under")
    if inference_params.batch_size_offset:
        raise NotImplementedError(
            f"batch_size_offset is {inference_params.batch_size_offset}, expected 0: rows are not offset"
        )
    memory = inference_params.key_value_memory_dict
    if layer.layer_idx not in memory:
        memory[layer.layer_idx] = layer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
    states = memory[layer.layer_idx]
    if len(states[0]) != batch_size:
        raise ValueError(f"states are of {len(states[0])} sequences, expected the {batch_size} of the batch")
    if initialize_states or inference_params.seqlen_offset == 0:
        for state in states:
            state.zero_()
    return states


class GenerationMixin:
    """Gives a model whose forward takes `inference_params` and `num_last_tokens` a `generate`."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts; arguments as for `decode`.

        Returns:
            Prompts and new tokens `(b, l)`, or a `GenerateOutput` with `return_dict_in_generate`.
        """
        found = decode(
            input_ids,
            self,
            max_length,
            top_k,
            top_p,
            min_p,
            temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return found if return_dict_in_generate else found.sequences


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Streamer | None = None,
) -> GenerateOutput:
    """Continue prompts of one length, token by token.

    Args:
        input_ids: Prompts `(b, l)`.
        model: A `MambaLMHeadModel`.
        max_length: Tokens of prompt and continuation together.
        top_k: Keep the k most likely tokens; 1 is greedy, 0 keeps all.
        top_p: Keep the most likely tokens up to this sum of probabilities; 0 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one, where `top_k` is 0.
        temperature: Divides the logits.
        repetition_penalty: Above 1, makes tokens that have appeared less likely.
        eos_token_id: Ends a row, which is filled with it.
        teacher_outputs: Tokens to take in place of the chosen ones, as far as they reach `(b, m)`.
        vocab_size: Tokens from this number on are never chosen.
        cg: Only False: `mambakit.load` and `mambakit.generate` record a step as a CUDA graph.
        enable_timing: Only False.
        output_scores: Return the logits, too.
        streamer: Is given the prompts and every new token.

    Returns:
        The tokens, and the logits if asked for.

    Raises:
        ValueError: Settings out of range, or `min_p` with `top_k`, which theirs does not look at.
        NotImplementedError: `cg` or `enable_timing`.
    """
    for name, value in (("cg", cg), ("enable_timing", enable_timing)):
        if value:
            raise NotImplementedError(f"generate: {name} is {value}, expected False; see mambakit.generate")
    if min_p and top_k > 0:
        raise ValueError(f"generate: min_p is {min_p} with top_k={top_k}, expected top_k=0 beside it")
    sampling = Sampling(
        temperature=0.0 if top_k == 1 else temperature,
        top_k=top_k,
        top_p=top_p or 1.0,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=int(torch.randint(2**62, ())),  # torch.manual_seed decides, as it does in theirs
    )
    sampler = Sampler(sampling, input_ids, vocab_size)
    params = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sequences, scores = [input_ids], []
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for length in range(input_ids.shape[1], max_length):
        logits = model(sequences[-1], inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]
        params.seqlen_offset = length
        if output_scores:
            scores.append(logits.clone())
        token = sampler(logits)
        if teacher_outputs is not None and length < teacher_outputs.shape[1]:
            token = teacher_outputs[:, length]
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended = ended | (token == eos_token_id)
        sequences.append(token.unsqueeze(1))
        if streamer is not None:
            streamer.put(sequences[-1].cpu())
        if bool(ended.all()):
            break
    if streamer is not None:
        streamer.end()
    return GenerateOutput(torch.cat(sequences, dim=1), tuple(scores) if output_scores else None)
