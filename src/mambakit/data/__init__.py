"""Data: text, token shards, images and synthetic tasks, as samples that are a pure function of (seed, index).

    config.py        DataConfig: what every source offers
    samples.py       where randomness comes from; Samples and Epochs, the datasets underneath
    loader.py        batches(): a stream of batches that can start anywhere
    tokenizers.py    characters, bytes, subwords
    text.py          tiny Shakespeare and any UTF-8 file
    documents.py     text files, tables and conversations, packed;  chat.py  chat templates
    labelled.py      texts with a class each, packed
    tokens.py        memory-mapped token shards
    mnist.py         MNIST and Fashion-MNIST as pixel sequences
    fetch.py         MAMBAKIT_DATA, the cache, and checked downloads
    synthetic/       selective copying, induction heads, MQAR, parity, modular arithmetic

Importing this needs torch and numpy only; the tokenizers library is loaded when a subword tokeniser is made.
"""

from mambakit.data.chat import ChatTemplate
from mambakit.data.config import Baseline, DataConfig, DataError
from mambakit.data.documents import DocumentsConfig
from mambakit.data.labelled import LabelledTextConfig, pack
from mambakit.data.loader import batches
from mambakit.data.mnist import FashionMnistConfig, MnistConfig, read_idx
from mambakit.data.samples import Epochs, Samples, Stream
from mambakit.data.synthetic import (
    InductionHeadsConfig,
    ModularArithmeticConfig,
    MqarConfig,
    ParityConfig,
    SelectiveCopyingConfig,
)
from mambakit.data.text import ShakespeareConfig, TextConfig, shakespeare
from mambakit.data.tokenizers import Bytes, Characters, Subwords, Tokenizer, tokenizer_from
from mambakit.data.tokens import TokensConfig, TokenShards, write_shards

__all__ = [
    "Baseline",
    "Bytes",
    "Characters",
    "ChatTemplate",
    "DataConfig",
    "DataError",
    "DocumentsConfig",
    "Epochs",
    "FashionMnistConfig",
    "InductionHeadsConfig",
    "LabelledTextConfig",
    "MnistConfig",
    "ModularArithmeticConfig",
    "MqarConfig",
    "ParityConfig",
    "Samples",
    "SelectiveCopyingConfig",
    "ShakespeareConfig",
    "Stream",
    "Subwords",
    "TextConfig",
    "TokenShards",
    "Tokenizer",
    "TokensConfig",
    "batches",
    "pack",
    "read_idx",
    "shakespeare",
    "tokenizer_from",
    "write_shards",
]
