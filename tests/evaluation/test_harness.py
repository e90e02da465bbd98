"""Our adapter for the lm-evaluation-harness, against our own numbers and the harness's own adapter."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mambakit
from mambakit.data import Subwords
from mambakit.evaluation import Reader, exact_perplexity, multiple_choice
from mambakit.evaluation.harness import MambakitLM

LETTERS = {chr(n): n - 30 for n in range(32, 127)} | {"<|endoftext|>": 0, "\n": 1}
QUESTIONS = [
    {"context": f"Question {n}: {n % 3} and", "choices": [" one", " two more", " a third"], "answer": n % 3}
    for n in range(12)
]


def letters() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def theirs():
    """A toy that transformers runs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=len(LETTERS), hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=0
    )
    return transformers.MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The toy as a published checkpoint."""
    folder = tmp_path_factory.mktemp("toy")
    theirs.save_pretrained(folder)
    letters().save(str(folder / "tokenizer.json"))
    return folder


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number, metadata=("toy", number, 1))
        for number, one in enumerate(arguments)
    ]


PAIRS = [("Question one:", " an answer"), ("Two ", "words"), ("", "from nothing"), ("x" * 50, " y")]
TEXTS = [("A text to be judged from its beginning to its end, longer than a window.",), ("short",)]
PROMPTS = [("Once upon", {"until": ["e"], "max_gen_toks": 12}), ("a", {"until": [], "max_gen_toks": 5})]


def test_it_is_registered_and_agrees_with_the_harness_own_adapter(theirs, folder):
    transformers = pytest.importorskip("transformers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters(), eos_token="<|endoftext|>")
    other = huggingface.HFLM(pretrained=theirs, tokenizer=fast, max_length=40, batch_size=2, device="cpu")
    ours = get_model("mambakit").create_from_arg_string(f"path={folder},device=cpu,max_length=40")
    for (one, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(requests("loglikelihood", *PAIRS)),
        other.loglikelihood(requests("loglikelihood", *PAIRS)),
        strict=True,
    ):
        assert (one, greedy) == (pytest.approx(expected, rel=1e-4), expected_greedy)
    rolling = requests("loglikelihood_rolling", *TEXTS)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        other.loglikelihood_rolling(rolling), rel=1e-4
    )
    assert ours.generate_until(requests("generate_until", *PROMPTS)) == other.generate_until(
        requests("generate_until", *PROMPTS)
    )


def test_rolling_is_exact_without_a_window(folder):
    ours = MambakitLM(str(folder), device="cpu")
    [(text,), _] = TEXTS
    ids = torch.tensor([0, *ours.tok_encode(text)])
    [found, _] = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS))
    assert found == pytest.approx(-exact_perplexity(ours.reader.model, ids).nats)
    windows = MambakitLM(str(folder), device="cpu", max_length=16)
    assert windows.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS))[0] != found


def test_a_task_of_the_harness_gives_our_own_numbers(folder, tmp_path):
    """A multiple-choice task from a local file, run by the harness."""
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    task = {
        "task": "toy_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    ours = MambakitLM(Reader(mambakit.load(folder), Subwords(letters().to_str()), 0, "toy"))
    found = simple_evaluate(model=ours, tasks=[task], bootstrap_iters=0)["results"]["toy_choice"]
    expected = multiple_choice(ours.reader, QUESTIONS)
    assert found["acc,none"] == pytest.approx(expected["acc"])
    assert found["acc_norm,none"] == pytest.approx(expected["acc_norm"])
