"""What `load` and `save` say of files and models that they cannot take, and what they do not copy."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambakit
from mambakit.checkpoints import CheckpointError
from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config, S4DConfig
from mambakit.testing.toys import TOYS

SMALL = {"vocab_size": 24, "d_model": 16, "pattern": "2M"}
MIXERS = {
    "mamba": Mamba1Config(d_state=4),
    "mamba2": Mamba2Config(d_state=8, headdim=8, ngroups=2),
    "falcon_mamba": Mamba1Config(d_state=4, inner_norm="plain"),
}


def model_of(family, **settings):
    torch.manual_seed(0)
    config = mambakit.LanguageModelConfig(**{**SMALL, "mixers": {"M": MIXERS[family]}, **settings})
    return mambakit.LanguageModel(config)


def edit(folder, **changes):
    """Change keys of the `config.json`; `None` removes one."""
    found = json.loads((folder / "config.json").read_text())
    found = {k: v for k, v in {**found, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(found))


def swap(folder, **changes):
    """Change tensors; `None` removes one."""
    found = load_file(folder / "model.safetensors")
    found = {
        k: v
        for k, v in {**found, **{k.replace("__", "."): v for k, v in changes.items()}}.items()
        if v is not None
    }
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: edit(at, model_type="mambo"), "unknown model_type 'mambo'; did you mean 'mamba'"),
        (lambda at: edit(at, model_type=None), "names no model_type"),
        (lambda at: edit(at, model_type=7), "unknown model_type 7"),
        (lambda at: edit(at, hidden_size="wide"), "hidden_size: .*'wide'"),
        (
            lambda at: edit(at, hidden_size=17),
            r"backbone.embeddings.weight has shape \(24, 16\), expected \(24 .*17\)",
        ),
        (lambda at: edit(at, vocab_size=25), r"expected \(25 or more, 16\)"),
        (lambda at: edit(at, num_hidden_layers=0), "0 layers, expected 1"),
        (lambda at: edit(at, num_hidden_layers=10**9), "1000000000 layers, expected 1"),
        (lambda at: edit(at, num_hidden_layers=3), "backbone.layers.2.norm.weight is missing"),
        (lambda at: edit(at, num_hidden_layers=1), "backbone.layers.1.* belongs to no part of the network"),
        (lambda at: edit(at, state_size=5), r"A_log has shape \(32, 4\), expected \(32, 5\)"),
        (lambda at: edit(at, state_size=-1), "d_state"),
        (lambda at: edit(at, state_size=10**18), "config.json describes no network"),
        (lambda at: edit(at, time_step_rank=[1]), "time_step_rank"),
        (lambda at: edit(at, hidden_act="gelu"), "hidden_act"),
        (lambda at: swap(at, backbone__norm_f__weight=None), "backbone.norm_f.weight is missing"),
        (lambda at: swap(at, extra=torch.zeros(1)), "extra belongs to no part of the network"),
        (
            lambda at: swap(at, backbone__norm_f__weight=torch.zeros(3)),
            r"norm_f.weight has shape \(3,\), expected \(16,\)",
        ),
        (lambda at: swap(at, backbone__norm_f__weight=torch.zeros(16, dtype=torch.int8)), "is of torch.int8"),
        (
            lambda at: swap(at, backbone__embeddings__weight=torch.zeros(24, 16, dtype=torch.int64)),
            "weights of torch.int64",
        ),
        (lambda at: swap(at, lm_head__weight=torch.zeros(24, 16)), "lm_head.weight is not the embedding"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(tmp_path, change, message):
    mambakit.save(model_of("mamba"), tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises(CheckpointError, match=message) as caught:
        mambakit.load(tmp_path / "it")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_padded_vocabulary_and_a_tied_head_that_is_stored_load(tmp_path):
    model = model_of("mamba")
    mambakit.save(model, tmp_path / "it")
    edit(tmp_path / "it", vocab_size=21)
    swap(tmp_path / "it", lm_head__weight=model.embedding.weight.detach().clone())
    assert mambakit.load(tmp_path / "it").config.vocab_size == 24


def test_an_old_mamba_ssm_config_with_missing_keys_loads(tmp_path):
    model = model_of("mamba", pattern="3M", mixers={"M": Mamba1Config()})
    mambakit.save(model, tmp_path / "it", layout="mamba_ssm")
    (tmp_path / "it" / "config.json").write_text(json.dumps({"d_model": 16, "n_layer": 3, "vocab_size": 19}))
    tokens = torch.arange(19)[None]
    assert torch.equal(mambakit.load(tmp_path / "it")(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1", "d_stat": 4}}, "unknown argument 'd_stat'; did you mean 'd_state'"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "of mamba_ssm either"),
        ({"rms_norm": False}, "backbone.layers.0.norm.bias is missing"),
        ({"attn_layer_idx": [1]}, "num_heads is None"),
        ({"attn_layer_idx": [2]}, "attn_layer_idx: 2, expected layers 0 to 1"),
        (
            {"attn_layer_idx": [1], "attn_cfg": {"num_head": 2}},
            "unknown argument 'num_head'; did you mean 'num_heads'",
        ),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "mlp_dim": 8}}, "mlp_dim is 8, expected 0"),
        (
            {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}},
            r"in_proj.weight: has 64 rows, expected 16 \+ 16 \+ 16",
        ),
        ({"d_intermediate": 64}, "backbone.layers.0.norm2.weight is missing"),
        ({"d_intermediate": -64}, "d_hidden"),
        ({"ssm_cfg": {"layer": "Mamba3", "is_mimo": "no"}}, "is_mimo is 'no', expected true or false"),
        ({"ssm_cfg": {"layer": "Mamba3", "a_activation": "relu"}}, "unknown a_activation 'relu'"),
    ],
)
def test_what_a_mamba_ssm_config_asks_is_never_ignored(tmp_path, changes, message):
    mambakit.save(model_of("mamba"), tmp_path / "it", layout="mamba_ssm")
    edit(tmp_path / "it", **changes)
    with pytest.raises(CheckpointError, match=message):
        mambakit.load(tmp_path / "it")


def test_a_model_of_no_family_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="no published family describes this network"):
        mambakit.save(model_of("mamba", mixers={"M": S4DConfig()}), tmp_path / "it")
    with pytest.raises(CheckpointError, match="unknown layout 'mamba-ssm'; did you mean 'mamba_ssm'"):
        mambakit.save(model_of("mamba"), tmp_path / "it", layout="mamba-ssm")
    assert not (tmp_path / "it").exists()


@torch.no_grad()
def test_sizes_that_follow_from_the_width_are_written_outright(tmp_path):
    mixers = {"*": AttentionConfig(n_heads=4, rope_fraction=0.5), "M": Mamba2Config(d_state=8, headdim=8)}
    config = mambakit.LanguageModelConfig(
        vocab_size=24, d_model=32, pattern="M-*-", mixers=mixers, residual_in_fp32=False
    )
    torch.manual_seed(0)
    model = mambakit.LanguageModel(config)
    mambakit.save(model, tmp_path / "it")
    found = json.loads((tmp_path / "it" / "config.json").read_text())
    assert (found["model_type"], found["head_dim"], found["intermediate_size"]) == ("bamba", 8, 128)
    tokens = torch.arange(24)[None]
    assert torch.equal(mambakit.load(tmp_path / "it")(tokens), model(tokens))


def test_weights_stay_on_the_mapped_file_and_scalars_are_float32(tmp_path):
    mambakit.save(model_of("mamba2"), tmp_path / "it", dtype=torch.bfloat16)
    model = mambakit.load(tmp_path / "it")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert model.backbone.blocks[0].mixer.A_log.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert model.lm_head.weight is model.embedding.weight
    before = (tmp_path / "it" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert (tmp_path / "it" / "model.safetensors").read_bytes() == before


BIG = """
import resource, sys, torch, mambakit
mixers = {"M": mambakit.Mamba1Config()}
config = mambakit.LanguageModelConfig(vocab_size=64, d_model=1024, pattern="6M", mixers=mixers)
if sys.argv[2] == "save":
    mambakit.save(mambakit.LanguageModel(config), sys.argv[1])
else:
    # What they import stays out of the count: PyTorch's compiler alone is 160 MB.
    mambakit.LanguageModel(config, device="meta")
    mambakit.LanguageModelConfig.from_dict({"vocab_size": 64, "d_model": 8, "pattern": "M"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = mambakit.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
    total = float(sum(p.detach().sum() for p in model.parameters()))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_never_holds_two_copies(tmp_path, dtype):
    def run(what):
        words = [sys.executable, "-c", BIG, str(tmp_path / "it"), what]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    run("save")
    size = (tmp_path / "it" / "model.safetensors").stat().st_size
    assert size > 150e6
    assert (
        int(run(dtype)) * 1024 < {"float32": 1.3, "bfloat16": 1.8}[dtype] * size
    )  # the mapped file counts too


WEIGHTS, OLD, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"


def fuzzed(folder, number):
    """Damage one file of a checkpoint in a way that depends on a number."""
    chance = random.Random(number)
    name = chance.choice([name for name in ("config.json", WEIGHTS, OLD, INDEX) if (folder / name).exists()])
    content = bytearray((folder / name).read_bytes())
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(content))
        if name == WEIGHTS and chance.random() < 0.8:
            at = chance.randrange(min(len(content), 2500))  # its header
        kind = chance.random()
        if kind < 0.5:
            content[at] = chance.randrange(256)
        elif kind < 0.7:
            del content[at : at + chance.choice([1, 3, 50, len(content)])]
        elif kind < 0.9:
            content[at:at] = chance.choice(
                [b"0", b"99999999999", b"-", b'"', b"[", b"}", b"null", b"\x00", b"1e400"]
            )
        else:
            content[at:at] = content[at // 2 : at]
        content = content or bytearray(b" ")
    (folder / name).write_bytes(content)
    return name


def check_fuzzed(tmp_path, numbers):
    """Damage checkpoints of all families in turn: a model, or one line that says what is wrong."""
    refused, kept, names = 0, {}, list(TOYS)
    for toy in names:
        torch.manual_seed(0)
        mambakit.save(mambakit.LanguageModel(TOYS[toy].ours()), tmp_path / toy)
        if (tmp_path / toy / WEIGHTS).exists():
            index = json.dumps({"weight_map": dict.fromkeys(load_file(tmp_path / toy / WEIGHTS), WEIGHTS)})
            (tmp_path / toy / INDEX).write_text(index)
        kept[toy] = {path.name: path.read_bytes() for path in (tmp_path / toy).iterdir()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        toy = names[number % len(names)]
        name = fuzzed(tmp_path / toy, number)
        start = time.monotonic()
        try:
            mambakit.load(tmp_path / toy)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, (number, error)
        except BaseException as error:
            raise AssertionError(f"file {number} of {toy}, {name}: {error!r}") from error
        assert time.monotonic() - start < 20, number
        (tmp_path / toy / name).write_bytes(kept[toy][name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    return refused / len(numbers)


def test_fuzzed_files_are_refused_in_one_line(tmp_path):
    assert check_fuzzed(tmp_path, range(300)) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_fuzzed_files(tmp_path):
    assert check_fuzzed(tmp_path, range(10_000)) > 0.5
