"""Generation: from a prompt and a language model to a stream of tokens or text.

`sampling` chooses a token from logits, `decode` runs the model with its state, `text` turns tokens into
characters and watches for stop strings.
"""

from mambakit.generation.decode import generate, stream
from mambakit.generation.sampling import Sampler, Sampling
from mambakit.generation.text import StopStrings, Tokenizer, stream_text

__all__ = ["Sampler", "Sampling", "StopStrings", "Tokenizer", "generate", "stream", "stream_text"]
