"""Our models as transformers' own: the same logits and texts through everything that transformers does."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import mambakit
from mambakit.bridges.transformers import (
    StateCache,
    StateSpaceConfig,
    StateSpaceForCausalLM,
    register,
    wrap,
)
from mambakit.families.family import Published
from mambakit.testing.toys import TOYS

FAMILIES = ("mamba", "mamba2", "mamba3", "jamba", "nemotron_h")


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register()  # twice is once


def network(name, dtype=torch.float64):
    torch.manual_seed(0)
    toy: Published = TOYS[name]
    model = mambakit.LanguageModel(toy.ours(), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def made(name, dtype=torch.float64):
    return wrap(network(name, dtype), pad_token_id=0, bos_token_id=None, eos_token_id=None)


def prompts(batch=2, length=9):
    return torch.randint(1, 50, (batch, length))


def ours(model, tokens, count):
    greedy = mambakit.Sampling(temperature=0)
    new = mambakit.generate(model, tokens, max_tokens=count, sampling=greedy, engine="off")
    return torch.cat([tokens, new], 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_our_own_generate(name):
    model, tokens = made(name), prompts()
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = ours(model.model, tokens, 12)
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), expected)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **settings), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_nothing(name):
    """In one read, and in pieces that end within the padding, with it, and after it."""
    model, texts = made(name), [prompts(1, 9), prompts(1, 6), prompts(1, 11)]
    tokens, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, 11 - text.shape[1] :], mask[row, 11 - text.shape[1] :] = text[0], 1
    alone = [model(text).logits[0] for text in texts]
    padded = model(tokens, attention_mask=mask).logits
    for row, logits in enumerate(alone):
        torch.testing.assert_close(padded[row, 11 - len(logits) :], logits, rtol=0, atol=1e-10)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = [model.generate(text, **settings)[0, -8:] for text in texts]
    for chunk in (None, 2, 3, 5):
        more = {} if chunk is None else {"prefill_chunk_size": chunk}
        found = model.generate(tokens, attention_mask=mask, **settings, **more)
        assert torch.equal(found[:, -8:], torch.stack(expected)), chunk


def test_other_masks_are_refused_or_harmless():
    model, tokens = made("jamba"), prompts(2, 6)
    right, hole = torch.ones(2, 6), torch.ones(2, 6)
    right[0, 4:] = hole[1, 3] = 0
    logits = model(tokens, attention_mask=right, use_cache=False).logits
    torch.testing.assert_close(logits[0, :4], model(tokens[:1, :4]).logits[0], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="on the right of a text that is continued"):
        model(tokens, attention_mask=right)
    with pytest.raises(ValueError, match="within a text"):
        model(tokens, attention_mask=hole, use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 6, 6\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_beams_are_those_of_reading_everything_again(name):
    model, tokens = made(name), prompts()
    settings = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
    with_cache = model.generate(tokens, **settings)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **settings))
    assert not torch.equal(with_cache[::2], model.generate(tokens, max_new_tokens=8, do_sample=False))


def test_sampling_is_that_of_reading_everything_again():
    model, tokens = made("mamba"), prompts()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        settings = {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "use_cache": use_cache}
        drawn.append(model.generate(tokens, max_new_tokens=10, **settings))
    assert drawn[0].shape == (4, 19) and torch.equal(*drawn)


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_a_conversation_goes_on_from_its_cache(name):
    model, tokens, cache = made(name), prompts(), StateCache()
    settings = {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(tokens, past_key_values=cache, **settings)
    assert cache.get_seq_length() == 14  # the last token has not been read
    second = torch.cat([first, prompts(2, 4)], 1)
    found = model.generate(second, past_key_values=cache, **settings)
    assert torch.equal(found, ours(model.model, second, 6))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    again = model.generate(torch.cat([found[[1, 1]], prompts(2, 2)], 1), past_key_values=cache, **settings)
    whole = again[:, :-6]
    assert torch.equal(again, ours(model.model, whole, 6))
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-1)
    cache.reset()
    assert torch.equal(model.generate(tokens, past_key_values=cache, **settings), first)


def test_saved_and_loaded_by_its_kind_alone(tmp_path):
    for name in FAMILIES:
        model, folder = made(name), tmp_path / name
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "mambakit"
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert isinstance(again, StateSpaceForCausalLM) and not again.training
        assert again.model.config == model.model.config
        tokens = prompts()
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        tied = again.model.lm_head.weight is again.model.embedding.weight
        assert tied == model.model.config.tie_embeddings
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "mamba2", dtype=torch.bfloat16)
    mixer = narrow.model.backbone.blocks[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16 and mixer.A_log.dtype == torch.float32


def test_a_new_model_from_a_configuration_starts_as_ours_does():
    description = mambakit.config.to_dict(TOYS["mamba2"].ours())
    torch.manual_seed(3)
    new = AutoModelForCausalLM.from_config(AutoConfig.for_model("mambakit", network=description))
    torch.manual_seed(3)
    expected = mambakit.LanguageModel(TOYS["mamba2"].ours())
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), expected.parameters(), strict=True))
    assert new.config.vocab_size == 50 and new.config.num_hidden_layers == 3
    with pytest.raises(mambakit.ConfigError, match="d_modell"):
        StateSpaceConfig({"vocab_size": 5, "d_modell": 3, "pattern": "M"})


def test_wrapping_shares_the_parameters_and_what_the_file_said(tmp_path):
    model = network("mamba2", torch.float32)
    model.published = {"eos_token_id": 7, "model_type": "mamba2"}
    wrapped = wrap(model)
    assert wrapped.model is model and wrapped.config.eos_token_id == 7 and wrapped.device.type == "cpu"
    found = wrapped.generate(prompts(), max_new_tokens=40, do_sample=False, pad_token_id=0)[:, 9:]
    for line in found.tolist():
        assert 7 not in line or set(line[line.index(7) + 1 :]) <= {0}


def test_the_loss_and_its_gradients_are_cross_entropy():
    model, tokens = made("mamba2"), prompts(2, 12)
    labels = tokens.clone()
    labels[0, :5] = -100
    loss = model(tokens, labels=labels).loss
    expected = F.cross_entropy(model.model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), logits_to_keep=3).logits
    torch.testing.assert_close(embedded, model(tokens).logits[:, -3:], rtol=0, atol=1e-12)
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    packed = model(tokens, seq_idx=documents).logits[:, 5:]
    torch.testing.assert_close(packed, model(tokens[:, 5:]).logits, rtol=0, atol=1e-10)


def test_what_it_cannot_do_is_refused_by_name():
    model, tokens = made("mamba"), prompts()
    for message, more in {
        "output_hidden_states is True": {"output_hidden_states": True},
        "output_attentions is True": {"output_attentions": True},
        "past_key_values is a DynamicCache": {"past_key_values": transformers.DynamicCache()},
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            model(tokens, **more)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static")


def test_gradient_checkpointing_is_ours():
    model, tokens = made("jamba").train(), prompts()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.model.backbone.checkpoint_blocks
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    model.gradient_checkpointing_disable()
    assert not model.model.backbone.checkpoint_blocks


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers

    words = {"<pad>": 0, **{f"w{n}": n for n in range(1, 50)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, pad_token="<pad>", padding_side="left")


def test_a_pipeline_writes_text(tokenizer):
    model = made("mamba2", torch.float32)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w3 w5 w7", "w11 w2 w9 w4 w1"]
    found = pipe(texts, max_new_tokens=6, do_sample=False, batch_size=2)
    for text, [one] in zip(texts, found, strict=True):
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        new = ours(model.model, tokens, 6)[0, tokens.shape[1] :]
        assert one["generated_text"] == text + tokenizer.decode(new, skip_special_tokens=True)


def test_a_trainer_trains_what_auto_classes_make(tmp_path, tokenizer):
    """A text that repeats three words is learnt, saved, and written by what is loaded again."""
    description = mambakit.config.to_dict(TOYS["mamba2"].ours())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(StateSpaceConfig(description, pad_token_id=0))
    text = torch.tensor([3, 5, 7] * 7)
    samples = [{"input_ids": text[n : n + 16], "labels": text[n : n + 16]} for n in range(3)] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=samples)
    assert trainer.train().training_loss < 1.5  # 3.9 at the start
    trainer.save_model(str(tmp_path / "best"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    written = again.generate(torch.tensor([[3, 5, 7, 3]]), max_new_tokens=6, do_sample=False)
    assert written[0, 4:].tolist() == [5, 7, 3, 5, 7, 3]


def test_lora_of_peft_trains_every_projection(tmp_path):
    """`out_proj`, which PEFT refuses on transformers' models, and `dt_proj`, which learns nothing there."""
    base, tokens = made("mamba", torch.float32).train(), prompts(2, 12)
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    model(input_ids=tokens, labels=tokens).loss.backward()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names for n in adapters if f".{name}." in n} == set(names)
    assert len(adapters) == 2 * 4 * 3  # two matrices, four projections, three blocks
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
    model.eval().save_pretrained(tmp_path)
    expected = model(input_ids=tokens).logits
    again = peft.PeftModel.from_pretrained(made("mamba", torch.float32), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    written = merged.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, ours(merged.model, tokens, 5))
