"""Generation: from a prompt and a language model to a stream of tokens or text.

`sampling` chooses a token from logits, `decode` runs the model with its state, `engine` does the same for
single tokens in one native call on a CPU, `recorded` as one CUDA graph on a GPU, `text` turns tokens into
characters and watches for stop strings.
"""

from mambakit.generation.decode import generate, stream
from mambakit.generation.engine import DecodeEngine
from mambakit.generation.recorded import RecordedDecoder
from mambakit.generation.sampling import Sampler, Sampling
from mambakit.generation.text import StopStrings, Tokenizer, stream_text

__all__ = [
    "DecodeEngine",
    "RecordedDecoder",
    "Sampler",
    "Sampling",
    "StopStrings",
    "Tokenizer",
    "generate",
    "stream",
    "stream_text",
]
