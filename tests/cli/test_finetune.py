"""`mambakit finetune` and `mambakit evaluate` on the command line."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A folder like the one that MAMBAKIT_DATA names."""
    (tmp_path / "text").mkdir()
    lines = "".join(f"{'to be' if n % 3 else 'not that'} the question\t{min(n % 3, 1)}\n" for n in range(30))
    for name in ("train", "dev", "test"):
        (tmp_path / "text" / f"sst2_{name}.tsv").write_text(lines)
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path))
    return tmp_path


SHORT = ["train.steps=4", "train.batch_size=4", "train.eval_every=2", "train.tensorboard=false", "device=cpu"]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_recipe_runs_from_another_model(cli, text_run, reviews, mode):
    words = [f"finetune.source={text_run}", f"finetune.mode={mode}", f"out={reviews / 'run'}", *SHORT]
    code, shown, said = cli("finetune", "sst2", *words)
    assert code == 0, said
    assert "f1" in shown and "trained" in shown and "write text" not in shown
    assert (reviews / "run" / "adapter").is_dir() == (mode == "lora")
    code, shown, said = cli("eval", reviews / "run")
    assert code == 0 and "accuracy" in shown, said


def test_conversations_end_in_a_model_that_writes(cli, text_run, tmp_path):
    talk = {"messages": [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not"}]}
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps(talk)}\n" * 40)
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"  # the run knows few letters
    (tmp_path / "plain.jinja").write_text(template)
    words = [f"data.files=[{tmp_path / 'talk.jsonl'}]", f"data.chat_template={tmp_path / 'plain.jinja'}"]
    code, shown, said = cli(
        "finetune",
        "chat",
        *(f"finetune.source={text_run}", f"out={tmp_path / 'run'}", "data.length=32", *words, *SHORT),
    )
    assert code == 0, said
    assert "write text" in shown


def test_a_recipe_that_starts_from_nothing_is_sent_to_train(cli):
    code, _, said = cli("finetune", "shakespeare")
    assert code == 2 and "starts from nothing" in said


def test_evaluate_writes_what_it_measured(cli, text_run, tmp_path):
    (tmp_path / "words.txt").write_text("to be or not to be that is the question " * 20)
    target = tmp_path / "found" / "result.json"
    results = {}
    for words in ([], ["--length", 64, "--stride", 16]):
        code, shown, said = cli(
            *("evaluate", text_run, "--task", "perplexity", "--file", tmp_path / "words.txt"),
            *("--device", "cpu", "--json", target, *words),
        )
        assert code == 0 and "perplexity" in shown, said
        results[len(words)] = json.loads(target.read_text())
    exact, strided = results[0], results[4]
    assert exact["settings"]["method"] == "exact, state carried" and strided["settings"]["stride"] == 16
    assert exact["metrics"]["tokens"] == strided["metrics"]["tokens"] == 799
    assert exact["metrics"]["perplexity"] == pytest.approx(strided["metrics"]["perplexity"], rel=0.2)
    assert list(target.parent.iterdir()) == [target]

    code, shown, _ = cli(
        *("evaluate", text_run, "--task", "lengths", "--file", tmp_path / "words.txt", "--length", 100),
        *("--device", "cpu", "--json", target),
    )
    assert code == 0 and "positions" in shown
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "last.jsonl").write_text('{"text": "to be or not to be"}\n')
    code, shown, _ = cli(
        *("evaluate", text_run, "--task", "lambada", "--file", tmp_path / "last.jsonl"),
        *("--device", "cpu", "--json", target),
    )
    assert code == 0 and json.loads(target.read_text())["metrics"]["passages"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "perplexty"], "did you mean 'perplexity'"),
        (["--task", "choice"], "needs a --file"),
        (["--task", "lambada", "--dtype", "float31"], "did you mean 'float32'"),
        (["--task", "lambada", "--file", "nothing.jsonl"], "nothing.jsonl' does not exist"),
    ],
)
def test_requests_that_cannot_be(cli, text_run, words, expected):
    code, _, said = cli("evaluate", text_run, *words)
    assert code == 2 and expected in said
