"""Packed documents, conversations and labelled texts: what is read, what is asked, and what never leaks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mambakit.config import ConfigError
from mambakit.data import (
    ChatTemplate,
    DataError,
    DocumentsConfig,
    LabelledTextConfig,
    Subwords,
    batches,
    shakespeare,
)
from mambakit.data.chat import PLAIN_TEMPLATE
from mambakit.data.samples import IGNORED
from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig
from mambakit.training import LanguageModeling

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "novel.txt").write_text("It was the best of times, it was the worst of times. " * 30)
    (tmp_path / "lines.tsv").write_text("".join(f"line number {n} of many\t{n % 2}\n" for n in range(40)))
    talks = [{"messages": TALK}, {"text": "plain words"}] * 6
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talks))
    return tmp_path


def config(files, *names, **changes) -> DocumentsConfig:
    given = {"length": 24, "vocabulary": "bytes", "validation_fraction": 0.2, **changes}
    return DocumentsConfig(files=tuple(str(files / name) for name in names), **given)


def test_a_document_never_asks_what_follows_it(files):
    data = config(files, "lines.tsv")
    batch = data.validation().batch(range(len(data.validation())))
    tokens, labels, seq_idx = (batch[key].flatten().numpy() for key in ("tokens", "labels", "seq_idx"))
    assert bytes(tokens.astype(np.uint8)).startswith(b"line number 32 of manyline number 33 of many")
    asked = np.flatnonzero(labels != IGNORED)
    # Within a window the label is the next token; at a border, and behind the end, there is none.
    length = batch["tokens"].shape[1]
    inner = asked[asked % length < length - 1]
    assert (labels[inner] == tokens[inner + 1]).all() and (seq_idx[inner] == seq_idx[inner + 1]).all()
    assert len(asked) == 8 * (len("line number 32 of many") - 1)


def test_training_passes_read_everything_once(files):
    data = config(files, "lines.tsv", length=16)
    passes = data.train(seed=3)
    windows = passes.batch(range(passes.per_pass))
    starts = np.sort(passes.places(np.arange(passes.per_pass)))
    assert (np.diff(starts) == 16).all()
    again = data.train(seed=3).batch([5])
    assert all(torch.equal(again[name][0], windows[name][5]) for name in windows)


def test_the_end_token_closes_every_document(files):
    data = config(files, "lines.tsv", vocabulary="subwords", vocabulary_size=300)
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, Subwords) and tokenizer.vocab_size <= data.vocab_size == 300
    tokens = data.validation().batch([0])["tokens"][0]
    labels = data.validation().batch([0])["labels"][0]
    ends = (tokens == 0).nonzero().flatten()
    assert len(ends) and (labels[ends] == IGNORED).all() and (labels[ends - 1] == 0).all()
    assert tokenizer.decode(tokenizer.encode("line number 7")) == "line number 7"


def test_learned_subwords_do_not_see_how_punctuation_is_set():
    tokenizer = Subwords.trained(["He said , no . He said, yes."] * 4, 60, lowercase=True)
    ids = tokenizer.encode("He said , no .")
    assert ids.tolist() == tokenizer.encode("he SAID, no.").tolist()
    assert tokenizer.decode(ids) == "he said , no ."


def test_the_same_texts_give_the_same_subwords():
    """A resumed run learns its vocabulary again."""
    once, again = (Subwords.trained([shakespeare()[:60000]], 500).definition for _ in "ab")
    assert once == again


@pytest.mark.parametrize("letter", ["S", "M", "*"])
def test_another_document_changes_no_bit_of_the_loss(letter):
    """Loss and gradient of document B, with whatever stands in document A before it."""
    torch.manual_seed(0)
    mixers = {
        "S": Mamba1Config(d_state=4),
        "M": Mamba2Config(d_state=8, headdim=8),
        "*": AttentionConfig(n_heads=2),
    }
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=31, d_model=16, pattern=f"2{letter}", mixers=mixers, tie_embeddings=False
        )
    )
    tokens = torch.randint(31, (1, 60))
    labels = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    labels[:, :37], labels[:, -1] = IGNORED, IGNORED
    seq_idx = (torch.arange(60) >= 37).int()[None]
    results = []
    for shift in (0, 5):
        batch = {"tokens": tokens.clone(), "labels": labels, "seq_idx": seq_idx}
        batch["tokens"][:, :37] = (tokens[:, :37] + shift) % 31
        loss, _ = LanguageModeling().loss(model, batch)
        results.append(
            (loss, *torch.autograd.grad(loss, [model.lm_head.weight, *model.backbone.parameters()]))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    batch["seq_idx"] = torch.zeros_like(seq_idx)  # as one document it does matter
    assert not torch.equal(LanguageModeling().loss(model, batch)[0], results[1][0])


# ---------------------------------------------------------------------------------------------------------
# Conversations

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_only_what_the_assistant_says_is_asked(files):
    data = config(files, "talk.jsonl", length=4096)
    batch = data.validation().batch([0])
    labels, seq_idx = batch["labels"][0], batch["seq_idx"][0]
    first = (seq_idx == seq_idx[0]) & (labels != IGNORED)
    said = bytes(labels[first].tolist()).decode()
    assert said in ("Four.\nYes.\n", "lain words")
    everything = bytes(labels[labels != IGNORED].tolist()).decode()
    assert "brief" not in everything and "two" not in everything
    assert everything.count("Four.\nYes.\n") == sum(
        1 for document in data._documents[1] if isinstance(document, list)
    )


@pytest.mark.parametrize("source", [CHATML, PLAIN_TEMPLATE], ids=["chatml", "plain"])
def test_templates_write_what_transformers_writes(source):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(n): n for n in range(32, 127)} | {"\n": 0}
    plain = Tokenizer(models.WordLevel(letters, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=source)
    ours = ChatTemplate(source)
    for opened in (False, True):
        expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=opened)
        assert ours.render(TALK, add_generation_prompt=opened) == expected
    if "generation %" in source:
        found = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
        ids, asked = ours.encode(TALK, Subwords(plain.to_str()))
        assert ids.tolist() == list(found["input_ids"])
        assert asked.tolist() == [bool(one) for one in found["assistant_masks"]]


def test_a_template_is_found_beside_a_published_tokeniser(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    settings = {
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
        "bos_token": {"content": "<s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.from_folder(tmp_path).render(TALK) == "<s>Be brief."


def test_templates_that_refuse_or_rewrite():
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}")
    with pytest.raises(DataError, match="no system"):
        ChatTemplate("{{ raise_exception('no system') }}").render(TALK)
    with pytest.raises(DataError, match="when more follows"):
        ChatTemplate("{{ messages | length }}{{ messages[-1]['content'] }}").pieces(TALK)
    with pytest.raises(DataError, match="refuses"):  # the sandbox
        ChatTemplate("{{ messages.append(1) }}").render(TALK)


# ---------------------------------------------------------------------------------------------------------
# Labelled texts


def labelled(files, **changes) -> LabelledTextConfig:
    given = {"train_file": "lines.tsv", "validation_file": "lines.tsv", "vocabulary": "bytes", **changes}
    for key in ("train_file", "validation_file"):
        given[key] = str(files / given[key])
    return LabelledTextConfig(classes=("even", "odd"), **given)


def test_texts_are_packed_with_a_filling_without_label(files):
    data = labelled(files)
    [batch] = batches(data.validation(), 40)
    assert batch["tokens"].shape[0] == 1 and batch["tokens"].shape[1] % 64 == 0
    lengths = batch["lengths"].tolist()
    assert len(lengths) == 41 and sum(lengths) == batch["tokens"].shape[1] and lengths[-1] >= 1
    parts = batch["tokens"][0].split(lengths)
    assert bytes(parts[7].tolist()) == b"line number 7 of many"
    assert batch["label"].tolist() == [n % 2 for n in range(40)] + [IGNORED]
    cut = labelled(files, max_length=4).validation().batch([3])
    assert bytes(cut["tokens"][0, :4].tolist()) == b"line" and cut["lengths"][0] == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("good film 1\n", "line 1: expected a text, a tab and a class from 0 to 1"),
        ("good film\t2\n", "line 1"),
        ("good film\tone\n", "line 1"),
        ("", "there is no text"),
        ("ok\t1\n\t0\n", "text 2 has no token"),
    ],
)
def test_tables_that_are_none(files, content, expected):
    (files / "bad.tsv").write_text(content)
    with pytest.raises(DataError, match=expected):
        labelled(files, train_file="bad.tsv").train(0)


def test_a_missing_file_says_where_it_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path))
    data = LabelledTextConfig(
        train_file="text/sst2_train.tsv",
        validation_file="text/sst2_dev.tsv",
        classes=("a", "b"),
        vocabulary="bytes",
        origin="nlp.stanford.edu",
    )
    with pytest.raises(DataError, match=r"does not exist.*MAMBAKIT_DATA.*nlp.stanford.edu"):
        data.train(0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": ()}, "files is empty"),
        ({"files": ("a.docx",)}, "ends in '.docx'"),
        ({"vocabulary": "subword"}, "did you mean 'subwords'"),
        ({"length": 0}, "length is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_settings_that_cannot_be(changes, expected):
    with pytest.raises(ValueError, match=expected):
        DocumentsConfig(**{"files": ("a.txt",), **changes})


@pytest.mark.parametrize("line", ['{"no": 1}', "[1]", "nonsense", '{"messages": [{"content": "x"}]}'])
def test_lines_that_are_no_documents(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        config(tmp_path, "bad.jsonl").validation()
