"""mambakit: selective state space models in PyTorch.

The names that most programs need. Importing them needs torch, numpy and safetensors, nothing else:

    ops         the operators, functions on tensors      layers    the mixers built on them
    models      backbone, language model, classifier     generate  text from a model, token by token

`mambakit.data`, `mambakit.training` and `mambakit.recipes` are imported by those who train.
"""

from mambakit import layers, models, ops
from mambakit.config import Config, ConfigError
from mambakit.generation import (
    Conversation,
    DecodeEngine,
    RecordedDecoder,
    Sampling,
    beam_search,
    generate,
    generate_text,
    speculate,
    stream,
    stream_reply,
    stream_text,
)
from mambakit.layers import (
    S4,
    S4D,
    Attention,
    AttentionConfig,
    Context,
    GatedMLP,
    GatedMLPConfig,
    Mamba1,
    Mamba1Config,
    Mamba2,
    Mamba2Config,
    Mamba3,
    Mamba3Config,
    Mixer,
    MixerConfig,
    S4Config,
    S4DConfig,
    State,
)
from mambakit.load import load, save
from mambakit.models import (
    LanguageModel,
    LanguageModelConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    pattern,
)

__version__ = "0.1.0"

__all__ = [
    "S4",
    "S4D",
    "Attention",
    "AttentionConfig",
    "Config",
    "ConfigError",
    "Context",
    "Conversation",
    "DecodeEngine",
    "GatedMLP",
    "GatedMLPConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba1",
    "Mamba1Config",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "Mixer",
    "MixerConfig",
    "RecordedDecoder",
    "S4Config",
    "S4DConfig",
    "Sampling",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "State",
    "__version__",
    "beam_search",
    "generate",
    "generate_text",
    "layers",
    "load",
    "models",
    "ops",
    "pattern",
    "save",
    "speculate",
    "stream",
    "stream_reply",
    "stream_text",
]
