"""Fine-tuning: a run that starts from a trained model instead of from nothing.

It is a run like any other: same loop, same folder, same checkpoints. What differs is decided here, before the
first step: which weights it starts from, how text becomes tokens (as the source's did), and what learns.

    full         everything
    lora         low-rank adapters in the mixers, and a classifier's head; everything else is frozen
    last-layers  the last blocks, the norm behind them, and the head where it is not the embedding

A finished LoRA run leaves the model with its adapters folded in, which everything else reads as it reads any
model, and beside it `adapter/`: the adapters alone, as the PEFT library keeps them.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path

from torch import nn

from mambakit import files
from mambakit.checkpoints import locate
from mambakit.checkpoints.files import CONFIG, read_config
from mambakit.config import ConfigError, merge, to_dict
from mambakit.layers import lora
from mambakit.load import load
from mambakit.models import LanguageModel, LanguageModelConfig, TextClassifier
from mambakit.training import folder
from mambakit.training.config import FinetuneConfig, TrainConfig

ADAPTER = "adapter"


def start(config: TrainConfig) -> tuple[TrainConfig, nn.Module]:
    """Make the model that a fine-tuning run begins with.

    Args:
        config: The run, with `finetune`.

    Returns:
        The run with the source's vocabulary in its data, and the model, frozen where the mode says so.

    Raises:
        ConfigError: A source that is not there, is no language model, is the run folder itself, or does not
            fit the run's other settings.
    """
    if Path(config.finetune.source).resolve() == config.folder.resolve():
        raise ConfigError(f"out: {config.folder} is the model to start from; choose another folder")
    source = read_source(config.finetune.source)
    config = with_vocabulary(config, source)
    return config, build(config, source)


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained language model to start from.

    Attributes:
        model: Its weights, on the CPU.
        vocabulary: Path of its tokeniser, where it has one.
    """

    model: LanguageModel
    vocabulary: str | None


def read_source(word: str) -> Source:
    """Load the language model that a word names.

    Args:
        word: A run folder, a checkpoint folder, or a repository such as `state-spaces/mamba-130m-hf`.

    Returns:
        The model, with weights in their own type.

    Raises:
        ConfigError: Nothing of this name, or a run that learned no language.
    """
    if is_run(word):
        model, config, _ = folder.load_run(word)
        model = model.language if isinstance(model, TextClassifier) else model
        if not isinstance(model, LanguageModel):
            raise ConfigError(f"{word} learned {config.task.tag}, expected a run that learned a language")
        place = Path(word)
    else:
        place = locate(word)
        model = load(place)
    vocabulary = place / folder.TOKENIZER
    return Source(model, str(vocabulary) if vocabulary.is_file() else None)


def is_run(word: str) -> bool:
    """Whether a word is to be understood as a run: one that is there, or the mistyped name of one."""
    place = Path(word)
    if (place / CONFIG).is_file():
        return "task" in read_config(place)
    here = place.exists() or place.parent.is_dir() or place.parts[0] == "runs"
    return here or word.count("/") != 1


def with_vocabulary(config: TrainConfig, source: Source) -> TrainConfig:
    """Let a run's data use the source's tokeniser, where the data asks for it with `vocabulary: null`.

    Raises:
        ConfigError: The data is no text, or the source has no tokeniser.
    """
    data = config.data
    if not hasattr(data, "vocabulary"):
        raise ConfigError(f"data.type: {data.tag!r} is not text, and a language model is fine-tuned on text")
    if data.vocabulary is not None:
        return config
    if source.vocabulary is None:
        raise ConfigError(
            f"finetune.source: {config.finetune.source} has no {folder.TOKENIZER}; "
            "give data.vocabulary the path of one"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, vocabulary=source.vocabulary))


def build(config: TrainConfig, source: Source) -> nn.Module:
    """Make the model of a run, with the source's weights, its parameters frozen as the mode says.

    Args:
        config: The run; `model` holds what is to differ from the source, such as `dropout`.
        source: Where its weights come from.

    Raises:
        ConfigError: Settings that the source's weights do not fit.
    """
    own = {field.name for field in dataclasses.fields(LanguageModelConfig)}
    given = {key: value for key, value in to_dict(source.model.config).items() if key in own}
    settings = merge(given, config.model)
    if config.finetune.mode == "lora" and "embedding" in config.finetune.lora.targets:
        settings["tie_embeddings"] = False  # the head keeps the embedding as it was
    model = config.task.build_model(settings, config.data)
    language = model.language if isinstance(model, TextClassifier) else model
    if not isinstance(language, LanguageModel):
        raise ConfigError(f"task.type: {config.task.tag!r} does not learn from a language model")
    try:
        language.load_state_dict(source.model.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"model: {config.finetune.source} does not fit these settings: {reason}") from None
    restrict(model, config.finetune)
    return model


def restrict(model: nn.Module, config: FinetuneConfig) -> None:
    """Freeze what the mode does not train, and add adapters where it is theirs to learn.

    Raises:
        ConfigError: More layers than there are, or adapters that find no place.
    """
    if config.mode == "full":
        return
    language = model.language if isinstance(model, TextClassifier) else model
    if config.mode == "lora":
        lora.add_adapters(model, config.lora)
    else:
        blocks = language.backbone.blocks
        if config.last_layers > len(blocks):
            raise ConfigError(
                f"finetune.last_layers: {config.last_layers}, and the model has {len(blocks)} blocks"
            )
        model.requires_grad_(False)
        for part in (*blocks[len(blocks) - config.last_layers :], language.backbone.norm_f):
            part.requires_grad_(True)
        if not language.config.tie_embeddings:
            language.lm_head.requires_grad_(True)
    if isinstance(model, TextClassifier):
        model.head.requires_grad_(True)


def finished(model: nn.Module) -> nn.Module:
    """The model to leave behind: without adapters, which are folded into a copy."""
    has_adapters = any(True for _ in lora.adapters(model))
    return lora.fold(copy.deepcopy(model)) if has_adapters else model


def write_adapter(model: nn.Module, config: TrainConfig) -> None:
    """Write the adapters of a LoRA run beside its model, each file in one step."""
    if config.finetune is None or config.finetune.mode != "lora":
        return
    heads = ("head",) if isinstance(model, TextClassifier) else ()
    place = config.folder / ADAPTER
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{ADAPTER}-", dir=config.folder) as made:
        lora.save_adapter(model, made, config.finetune.lora, config.finetune.source, modules=heads)
        for file in Path(made).iterdir():
            files.flush(file)
            file.replace(place / file.name)
    files.flush(place)
