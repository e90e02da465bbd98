"""The pattern language and the configs around it."""

from __future__ import annotations

import pytest

from mambakit.config import ConfigError, to_dict
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import BackboneConfig, LanguageModelConfig, SequenceClassifierConfig, pattern


def letters(text: str, known: str = "M-*E") -> str:
    configs = {letter: Mamba1Config(d_state=1 + i) for i, letter in enumerate(known)}
    return "".join(known[config.d_state - 1] for config in pattern(text, **configs))


@pytest.mark.parametrize(
    ("text", "flat"),
    [
        ("M-M-*-", "M-M-*-"),
        ("24M", "M" * 24),
        ("4(M-)", "M-M-M-M-"),
        ("2(2M*)M", "MM*MM*M"),
        ("2(M-2(M*))", "M-M*M*M-M*M*"),
        ("3(M-) *-", "M-M-M-*-"),
        ("2-", "--"),
    ],
)
def test_patterns_spell_out(text, flat):
    assert letters(text) == flat


@pytest.mark.parametrize("text", ["", "3(M-", "M)", "3", "()", "M-X"])
def test_unreadable_patterns_are_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        letters(text)


def test_config_round_trip():
    config = LanguageModelConfig(
        vocab_size=65, d_model=64, pattern="2(M-)", mixers={"M": Mamba2Config(d_state=16, headdim=32)}
    )
    plain = to_dict(config)
    assert plain["mixers"]["M"]["type"] == "mamba2"
    assert LanguageModelConfig.from_dict(plain) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "model.d_modle: unknown key 'd_modle'; did you mean 'd_model'?"),
        ({"d_model": "wide"}, "model.d_model: .*got 'wide'"),
        (
            {"mixers": {"M": {"type": "mamba3000"}}},
            "model.mixers.M: unknown type 'mamba3000'; did you mean 'mamba",
        ),
        (
            {"mixers": {"M": {"type": "mamba2", "d_stat": 3}}},
            "model.mixers.M.d_stat: unknown key 'd_stat'.*'d_state'",
        ),
        ({"mixers": {"M": {"type": "mamba2", "d_state": 0}}}, "model.mixers.M.*d_state=0"),
        ({"pattern": "3(M"}, "pattern '3\\(M' cannot be read"),
    ],
)
def test_errors_name_the_key_and_the_nearest(change, message):
    plain = {"vocab_size": 65, "d_model": 64, "pattern": "M", **change}
    with pytest.raises(ConfigError, match=message):
        LanguageModelConfig.from_dict(plain, "model")


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="d_model: a value is required"):
        BackboneConfig.from_dict({"pattern": "M"})


def test_classifier_wants_one_kind_of_input():
    with pytest.raises(ValueError, match="exactly one of the two"):
        SequenceClassifierConfig(d_model=8, pattern="-", n_classes=3)
