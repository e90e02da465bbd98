"""From a language model to a classifier, in every mode, through kill and resume, and back from its folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mambakit.config import ConfigError, merge
from mambakit.data.labelled import pack
from mambakit.generation import Sampling, generate
from mambakit.layers import lora
from mambakit.models import LanguageModel, TextClassifier
from mambakit.training import TextClassification, TrainConfig, evaluate, load_run, run
from mambakit.training import checkpoint as checkpoints

MIXERS = {"M": {"type": "mamba2", "d_state": 8, "headdim": 8}, "S": {"type": "mamba1", "d_state": 4}}
GOOD, BAD = ["lovely", "warm", "funny", "bright"], ["dull", "cold", "empty", "flat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reviews that one word decides, and a language model that has read them."""
    folder = tmp_path_factory.mktemp("finetuning")
    draw = random.Random(0)
    plain = ["the", "film", "is", "a", "story", "of", "some", "people", "who", "go", "on"]

    def line() -> str:
        label = draw.randrange(2)
        words = [draw.choice(plain) for _ in range(draw.randrange(3, 12))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
        return f"{' '.join(words)}\t{label}\n"

    for name, count in (("train", 300), ("dev", 60), ("test", 60)):
        (folder / f"{name}.tsv").write_text("".join(line() for _ in range(count)))
    run(
        TrainConfig.from_dict(
            {
                "task": {"type": "language-modeling"},
                "data": {
                    "type": "documents",
                    "files": [str(folder / "train.tsv")],
                    "length": 32,
                    "vocabulary_size": 64,
                },
                "model": {"d_model": 16, "pattern": "MS", "mixers": MIXERS},
                "optimizer": {"lr": 0.01},
                "train": {"steps": 20, "batch_size": 4, "eval_every": None, "tensorboard": False},
                "device": "cpu",
                "out": str(folder / "language"),
            }
        )
    )
    return folder


def settings(folder, out, **changes):
    return merge(
        {
            "task": {"type": "text-classification"},
            "finetune": {"source": str(folder / "language"), "lora": {"rank": 4, "alpha": 8.0}},
            "data": {
                "type": "labelled-text",
                "train_file": str(folder / "train.tsv"),
                "validation_file": str(folder / "dev.tsv"),
                "test_file": str(folder / "test.tsv"),
                "classes": ["bad", "good"],
            },
            "model": {"dropout": 0.1},
            "optimizer": {"lr": 0.01},
            "train": {
                "steps": 40,
                "batch_size": 16,
                "eval_every": None,
                "checkpoint_every": 10,
                "tensorboard": False,
            },
            "device": "cpu",
            "out": str(out),
        },
        changes,
    )


def finetune(folder, out, **changes):
    return run(TrainConfig.from_dict(settings(folder, out, **changes)))


@pytest.mark.parametrize("mode", ["full", "lora", "last-layers"])
def test_every_mode_learns_and_comes_back(folder, tmp_path, mode):
    changes = {"finetune": {"mode": mode, "last_layers": 1}, "model": {"pooling": "concat"}}
    if mode == "full":
        changes |= {"task": {"language_weight": 0.2, "label_smoothing": 0.05}, "train": {"ema": 0.9}}
    summary = finetune(folder, tmp_path / "run", **changes)
    assert summary["metrics"]["accuracy@test"] > 0.85 and summary["metrics"]["f1@test"] > 0.85
    assert (summary["trained_parameters"] == summary["parameters"]) == (mode == "full")
    model, config, _ = load_run(tmp_path / "run")
    assert isinstance(model, TextClassifier) and not list(lora.adapters(model))
    assert evaluate(model, config) == pytest.approx(summary["metrics"], rel=1e-5)

    before, after = load_file(folder / "language" / "model.safetensors"), model.language.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if mode == "full":
        assert "embedding.weight" in changed and len(changed) == len(before)
    elif mode == "lora":
        assert changed == {
            f"backbone.blocks.{place}.weight"
            for place in (
                *("0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.in_proj", "1.mixer.out_proj"),
                *("1.mixer.ssm.x_proj", "1.mixer.ssm.dt_proj"),
            )
        }
    else:
        assert changed == {name for name in before if ".1." in name or "norm_f" in name}


@pytest.mark.parametrize("targets", [[], ["embedding", "in_proj"]], ids=["mixers", "embedding"])
def test_adapters_alone_give_the_same_model(folder, tmp_path, targets):
    finetuned = {"mode": "lora", "lora": {"targets": targets}}
    summary = finetune(folder, tmp_path / "run", finetune=finetuned, train={"steps": 20, "ema": 0.9})
    model, config, _ = load_run(tmp_path / "run")
    assert evaluate(model, config) == pytest.approx(summary["metrics"], rel=1e-5)
    again = TextClassification().build_model(config.model)
    again.language.load_state_dict(load_run(folder / "language")[0].state_dict())
    lora.load_adapter(again, tmp_path / "run" / "adapter")
    batch = {key: torch.from_numpy(value) for key, value in pack([torch.arange(9).numpy()]).items()}
    torch.testing.assert_close(again.eval()(**batch), model(**batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_resumed_run_is_the_run_that_was_not(folder, tmp_path, mode, outcome, same):
    changes = {
        "finetune": {"mode": mode},
        "model": {"token_dropout": 0.2, "head_dropout": 0.3},
        "train": {"ema": 0.9, "keep": 9, "steps": 20},
    }
    finetune(folder, tmp_path / "whole", **changes)
    finetune(folder, tmp_path / "parts", **changes)
    for later in ("step-00000020",):  # as if killed after step 10
        for file in (tmp_path / "parts" / "checkpoints" / later).iterdir():
            file.unlink()
        (tmp_path / "parts" / "checkpoints" / later).rmdir()
    (tmp_path / "parts" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="using its checkpoint of step 10"):
        unfinished, _, _ = load_run(tmp_path / "parts")  # adapters folded in
    assert not list(lora.adapters(unfinished))
    finetune(folder, tmp_path / "parts", **changes, resume=True)
    one, other = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    same({"record": 0, "tensors": one["tensors"]}, {"record": 0, "tensors": other["tensors"]})


def test_conversations_are_learned_by_adapters(folder, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "lovely"}]}
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps(talk)}\n" * 60)
    summary = run(
        TrainConfig.from_dict(
            {
                "task": {"type": "language-modeling"},
                "finetune": {"source": str(folder / "language"), "mode": "lora"},
                "data": {
                    "type": "documents",
                    "files": [str(tmp_path / "talk.jsonl")],
                    "vocabulary": None,
                    "length": 48,
                },
                "optimizer": {"lr": 0.02},
                "train": {"steps": 30, "batch_size": 4, "eval_every": None, "tensorboard": False},
                "device": "cpu",
                "out": str(tmp_path / "talker"),
            }
        )
    )
    assert summary["metrics"]["val_accuracy"] > 0.9
    model, _, data = load_run(tmp_path / "talker")
    assert isinstance(model, LanguageModel)
    prompt = data.tokenizer.encode("<|user|>\na film\n<|assistant|>\n")
    greedy = {"max_tokens": 8, "sampling": Sampling(temperature=0.0)}
    said = generate(model, torch.from_numpy(prompt)[None], **greedy)[0]
    assert data.tokenizer.decode(said.tolist()).startswith("lovely")


def test_starting_from_a_classifier_takes_its_language_model(folder, tmp_path):
    finetune(folder, tmp_path / "one", train={"steps": 2})
    summary = finetune(
        folder, tmp_path / "two", finetune={"source": str(tmp_path / "one")}, train={"steps": 2}
    )
    assert summary["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finetune": {"source": "runs/langauge"}}, "unknown run"),
        ({"out": "{folder}/language"}, "is the model to start from"),
        ({"finetune": {"mode": "lorra"}}, "finetune.mode: input should be 'full', 'lora'"),
        ({"finetune": {"mode": "last-layers", "last_layers": 3}}, "the model has 2 blocks"),
        ({"finetune": {"mode": "lora", "lora": {"targets": ["qkv"]}}}, "unknown layer 'qkv'"),
        ({"model": {"d_model": 24}}, "does not fit these settings"),
        ({"model": {"n_classes": 3}}, "which has 2"),
        ({"data": {"vocabulary": "bytes"}}, "too small for the 256 tokens"),
        ({"task": {"label_smoothing": 1.0}}, "label_smoothing is 1.0"),
    ],
)
def test_requests_that_cannot_be(folder, tmp_path, changes, expected):
    changes = dict(changes)
    out = Path(changes.pop("out", str(tmp_path / "run")).format(folder=folder))
    with pytest.raises(ConfigError, match=expected):
        finetune(folder, out, **changes)


def test_damaged_checkpoints_are_passed_over(folder, tmp_path):
    finetune(folder, tmp_path / "run", train={"steps": 20})
    newest, refused = checkpoints.newest(tmp_path / "run" / "checkpoints")
    (newest.path / "model.safetensors").write_bytes(b"")
    found, refused = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert found.step == 10 and refused


# ---------------------------------------------------------------------------------------------------------
# The task


class Fixed(torch.nn.Module):
    """Says the given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def features(self, tokens, lengths, context):
        return None

    def classify(self, features, lengths):
        return self.logits


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(1, 3), "lengths": torch.ones(3), "label": torch.tensor(labels)}


def test_accuracy_and_f1_by_hand():
    # Said: 1 1 1 0 0, right: 1 0 1 1 0. Two true positives, one false, one missed: F1 = 4 / (4 + 1 + 1).
    logits = torch.tensor([[0.0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [5, 9]])
    metrics = TextClassification().evaluate(Fixed(logits), [batch([1, 0, 1, 1, 0, -100])])
    assert metrics["accuracy"] == 0.6 and metrics["f1"] == pytest.approx(2 / 3)
    expected = torch.nn.functional.cross_entropy(logits[:5], torch.tensor([1, 0, 1, 1, 0]))
    assert metrics["loss"] == pytest.approx(float(expected))


def test_f1_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    for classes, average in ((2, "binary"), (4, "macro")):
        logits, labels = torch.randn(50, classes), torch.randint(classes, (50,))
        found = TextClassification().evaluate(Fixed(logits), [batch(labels.tolist())])
        said = logits.argmax(-1)
        assert found["f1"] == pytest.approx(metrics.f1_score(labels, said, average=average))
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, said))


def test_label_smoothing_is_pytorchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), [0, 2, 1, 1, 0, -100]
    loss, _ = TextClassification(label_smoothing=0.2).loss(Fixed(logits), batch(labels))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.2)
    torch.testing.assert_close(loss.detach(), expected)


def test_parts_of_a_step_add_up_to_the_step(folder):
    """Gradient of a batch in one part and in two, the language model's own loss included for equal parts."""
    config = TrainConfig.from_dict(settings(folder, "unused"))
    data = config.data.__class__(
        **{**vars(config.data), "vocabulary": str(folder / "language/tokenizer.json")}
    )
    source, _, _ = load_run(folder / "language")
    task = TextClassification()
    model = task.build_model({**vars(source.config)}, data).double()
    whole = data.validation().batch(range(8))
    parts = [data.validation().batch(range(4)), data.validation().batch(range(4, 8))]
    gradients = []
    for some in ([whole], parts):
        model.zero_grad()
        for part in some:
            task.loss(model, part, targets=8)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
