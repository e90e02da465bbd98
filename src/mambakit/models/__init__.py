"""Models: a flat list of residual blocks between an encoder and a head."""

from mambakit.models.backbone import Backbone, BackboneConfig, pattern
from mambakit.models.block import Block
from mambakit.models.classifier import TextClassifier, TextClassifierConfig
from mambakit.models.language import LanguageModel, LanguageModelConfig
from mambakit.models.sequence import SequenceClassifier, SequenceClassifierConfig

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Block",
    "LanguageModel",
    "LanguageModelConfig",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "TextClassifier",
    "TextClassifierConfig",
    "pattern",
]
