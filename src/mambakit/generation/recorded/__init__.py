"""Decoding on a GPU: one token's step recorded once and replayed as one CUDA graph.

Producing a token takes hundreds of short kernels; started one by one they wait for the host, replayed as a
graph they follow each other without it. What is recorded is the model's own forward over the tensors of its
`State`, for any model whose state keeps its size; Mamba blocks are recorded in fewer kernels, written to
stream the weights as fast as memory gives them. `docs/decoding_gpu.md` says what it takes.

    decoder = RecordedDecoder(model)
    state = model.init_state(1)
    model(prompt, state)
    logits = decoder.step(token, state)  # (1, v)
"""

from mambakit.generation.recorded.decoder import RecordedDecoder

__all__ = ["RecordedDecoder"]
