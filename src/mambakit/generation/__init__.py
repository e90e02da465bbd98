"""Generation: from a prompt and a language model to a stream of tokens or text.

`sampling` chooses a token from logits, `prompts` brings prompts of different lengths into one batch,
`decode` runs the model with its state, `engine` does the same for single tokens in one native call on a CPU,
`recorded` as one CUDA graph on a GPU, `text` turns tokens into characters and watches for stop strings.
`beams` searches the likeliest texts, `speculative` lets a smaller model propose tokens, `conversation` saves
and forks what a model remembers.
"""

from mambakit.generation.beams import Beam, beam_search
from mambakit.generation.conversation import Conversation
from mambakit.generation.decode import generate, stream
from mambakit.generation.engine import DecodeEngine
from mambakit.generation.recorded import RecordedDecoder
from mambakit.generation.sampling import Sampler, Sampling
from mambakit.generation.speculative import Acceptance, speculate
from mambakit.generation.text import StopStrings, Tokenizer, generate_text, stream_reply, stream_text

__all__ = [
    "Acceptance",
    "Beam",
    "Conversation",
    "DecodeEngine",
    "RecordedDecoder",
    "Sampler",
    "Sampling",
    "StopStrings",
    "Tokenizer",
    "beam_search",
    "generate",
    "generate_text",
    "speculate",
    "stream",
    "stream_reply",
    "stream_text",
]
