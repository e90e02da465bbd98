"""ONNX graphs against the models they were made of, at batches and lengths other than those traced."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mambakit import (
    AttentionConfig,
    GatedMLPConfig,
    LanguageModel,
    LanguageModelConfig,
    Mamba1Config,
    Mamba2Config,
    Sampling,
    generate,
)
from mambakit.config import ConfigError
from mambakit.export import export_onnx

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

MODELS = {
    "both": (
        "SM-",
        {"S": Mamba1Config(d_state=5), "M": Mamba2Config(d_state=6, headdim=8, ngroups=2)},
        {},
    ),
}
MORE = {
    "mamba1": ("3M", {"M": Mamba1Config(d_state=5)}, {}),
    "falcon": ("2M", {"M": Mamba1Config(inner_norm="plain", bias=True)}, {"tie_embeddings": False}),
    "mamba2": ("2(M-)", {"M": Mamba2Config(d_state=6, headdim=8, ngroups=2), "-": GatedMLPConfig()}, {}),
    "mixed": (
        "MS",
        {
            "M": Mamba2Config(d_state=6, headdim=8, dt_limit=(0.01, 0.05), d_conv=3, gated_norm=False),
            "S": Mamba1Config(conv_bias=False),
        },
        {"embedding_scale": 2.0, "logits_scale": 0.5, "residual_scale": 0.7},
    ),
}


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    pattern, mixers, more = (MODELS | MORE)[name]
    config = LanguageModelConfig(vocab_size=61, d_model=24, pattern=pattern, mixers=mixers, **more)
    model = LanguageModel(config).eval()
    with torch.no_grad():  # larger than a fresh model's, so that states and steps matter
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or name == "embedding.weight":
                parameter.mul_(3)
    return model


class Runtime:
    """The two graphs in onnxruntime, by the manifest alone."""

    def __init__(self, folder):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.graphs = {
            name: ort.InferenceSession(folder / graph["file"], options, providers=["CPUExecutionProvider"])
            for name, graph in self.manifest["graphs"].items()
        }

    def empty(self, batch):
        return {s["input"]: np.zeros((batch, *s["shape"][1:]), np.float32) for s in self.manifest["states"]}

    def __call__(self, name, tokens, states):
        outputs = ["logits", *(s["output"] for s in self.manifest["states"])]
        logits, *after = self.graphs[name].run(outputs, {"tokens": np.asarray(tokens), **states})
        return logits, dict(zip(states, after, strict=True))


# An export takes some seconds, nearly all of them in PyTorch.
@pytest.fixture(scope="module", params=[*MODELS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def exported(request, tmp_path_factory):
    model = make(request.param)
    return model, Runtime(export_onnx(model, tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize(
    ("batch", "length"), [(1, 1), (1, 2), (3, 3), (1, 7), (2, 64), (5, 65), (1, 100), (1, 300)]
)
def test_prefill_is_the_forward_at_any_batch_and_length(exported, batch, length):
    model, runtime = exported
    tokens = torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(length))
    wide = LanguageModel(model.config, dtype=torch.float64)
    wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    state, theirs = wide.init_state(batch), runtime.empty(batch)
    for piece in (tokens, tokens.flip(1)):  # from the empty state, and from one with something in it
        with torch.no_grad():
            expected = wide(piece, state)[:, -1]
        logits, theirs = runtime("prefill", piece, theirs)
        torch.testing.assert_close(torch.tensor(logits).double(), expected, atol=2e-4, rtol=2e-4)
        for name, tensor in state.tensors():
            torch.testing.assert_close(torch.tensor(theirs[name]).double(), tensor, atol=2e-4, rtol=2e-4)


def test_a_text_in_pieces_and_token_by_token_is_the_text(exported):
    _, runtime = exported
    tokens = torch.randint(61, (2, 90), generator=torch.Generator().manual_seed(1))
    whole, states = runtime("prefill", tokens, runtime.empty(2))
    pieces = runtime.empty(2)
    for piece in tokens[:, :75].split((1, 70, 4), dim=1):
        _, pieces = runtime("prefill", piece, pieces)
    for token in tokens[:, 75:].unbind(1):
        logits, pieces = runtime("step", token, pieces)
    np.testing.assert_allclose(logits, whole, atol=1e-4, rtol=1e-4)
    for name, state in states.items():
        np.testing.assert_allclose(pieces[name], state, atol=1e-4, rtol=1e-4)


def test_greedy_writing_is_the_same_for_64_tokens(exported):
    model, runtime = exported
    prompt = torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(2))
    expected = generate(model, prompt, max_tokens=64, sampling=Sampling(temperature=0), engine="off")
    logits, states = runtime("prefill", prompt, runtime.empty(3))
    written = []
    for _ in range(64):
        written.append(logits.argmax(-1))
        logits, states = runtime("step", written[-1], states)
    assert len(np.unique(written)) > 5  # or equality would say little
    np.testing.assert_array_equal(np.stack(written, axis=1), expected)


def test_weights_are_written_once_and_stay_outside_of_the_graphs(exported):
    model, runtime = exported
    size = sum(4 * p.numel() for p in model.parameters())
    assert 0.9 * size < (runtime.folder / "weights.bin").stat().st_size < 1.1 * size
    names = ["manifest.json", "prefill.onnx", "step.onnx", "weights.bin"]
    assert sorted(p.name for p in runtime.folder.iterdir()) == names
    held = 0
    for name in ("prefill.onnx", "step.onnx"):
        graph = onnx.load(runtime.folder / name, load_external_data=False).graph
        held += sum(
            t.data_location != onnx.TensorProto.EXTERNAL and t.ByteSize() > 400 for t in graph.initializer
        )
    assert held == 0


@pytest.mark.slow
def test_a_model_in_bfloat16_is_exported_in_float32_and_not_changed(tmp_path):
    model = make("mamba1").bfloat16()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    runtime = Runtime(export_onnx(model, tmp_path / "out"))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = model.float()(tokens)[:, -1]
    np.testing.assert_allclose(runtime("prefill", tokens, runtime.empty(1))[0], expected, atol=2e-4)


def test_what_cannot_be_exported_is_said(tmp_path):
    config = LanguageModelConfig(
        vocab_size=16, d_model=32, pattern="M*", mixers={"*": AttentionConfig(n_heads=2)}
    )
    with pytest.raises(ConfigError, match="block 1 is of type 'attention', which has no ONNX form"):
        export_onnx(LanguageModel(config, device="meta"), tmp_path / "new")
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ConfigError, match="already holds an export"):
        export_onnx(make("mamba1"), tmp_path)
