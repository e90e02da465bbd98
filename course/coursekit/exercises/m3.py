"""Checks of module 3."""

from __future__ import annotations

import itertools

import torch

from coursekit.exercises import Exercise, close

# ---------------------------------------------------------------------------------------------------------
# Scaling

zero_bytes = Exercise("m3-zero-bytes", "device_bytes", "Training state of one device", stars=1, minutes=10)


@zero_bytes.part("one device holds 16 bytes per parameter at every stage")
def _(device_bytes, rng):
    count = int(torch.randint(10**6, 10**9, (1,), generator=rng))
    for stage in range(4):
        got = device_bytes(count, 1, stage)
        assert got == 16 * count, f"stage {stage} on one device: {got}, expected {16 * count}"


@zero_bytes.part(
    "all devices together hold every byte once, and the unsharded ones as often as there are devices"
)
def _(device_bytes, rng):
    devices = int(torch.randint(2, 300, (1,), generator=rng))
    for stage, copied in enumerate((16, 4, 2, 0)):
        got, expected = devices * device_bytes(1000, devices, stage), 1000 * (16 + copied * (devices - 1))
        assert abs(got - expected) < 1e-6 * expected, (
            f"stage {stage}: {got} bytes in all, expected {expected}"
        )


zero_bytes.wrong(
    "everything sharded at once",
    """
def device_bytes(parameters, devices, stage):
    return 16 * parameters / devices if stage else 16 * parameters
""",
)
zero_bytes.wrong(
    "the moments forgotten",
    """
def device_bytes(parameters, devices, stage):
    shared = (0, 4, 6, 8)[stage]
    return parameters * (8 - shared + shared / devices)
""",
)

pieces = Exercise(
    "m3-sequence-parallel", "combine", "Pieces of a scan at the same time", stars=3, minutes=30, graded=True
)


def _scan(a, b, start=None):
    h, out = torch.zeros_like(b[0]) if start is None else start, []
    for factor, added in zip(a, b, strict=True):
        h = factor * h + added
        out.append(h)
    return torch.stack(out)


def _cut(rng, k):
    a = torch.rand(k, 6, 3, generator=rng, dtype=torch.float64)
    b = torch.randn(k, 6, 3, generator=rng, dtype=torch.float64)
    return a, b, torch.stack([_scan(x, y) for x, y in zip(a, b, strict=True)])


@pieces.part("equals the scan of the whole sequence", points=3)
def _(combine, rng):
    a, b, local = _cut(rng, 4)
    close(combine(local, a).flatten(0, 1), _scan(a.flatten(0, 1), b.flatten(0, 1)), "the states", 1e-10)


@pieces.part("a decay of zero forgets all pieces before it", points=1)
def _(combine, rng):
    a, _, local = _cut(rng, 3)
    a[2, 0] = 0
    close(combine(local, a)[2], local[2], "the third piece", 1e-12)


@pieces.part("without decay the last states of the pieces add up", points=1)
def _(combine, rng):
    _, b, _ = _cut(rng, 3)
    close(combine(b.cumsum(1), torch.ones_like(b))[-1, -1], b.sum((0, 1)), "the last state", 1e-10)


pieces.wrong("nothing handed over", "def combine(local, decay):\n    return local\n")
pieces.wrong(
    "only the neighbour's own state",
    """
import torch
def combine(local, decay):
    before = torch.cat([torch.zeros_like(local[:1, -1]), local[:-1, -1]])
    return local + decay.cumprod(1) * before[:, None]
""",
)
pieces.wrong(
    "the state does not decay on its way",
    """
import torch
def combine(local, decay):
    joined, carried = [], torch.zeros_like(local[0, 0])
    for piece in local:
        joined.append(piece + carried)
        carried = joined[-1][-1]
    return torch.stack(joined)
""",
)
pieces.wrong(
    "one factor too few",
    """
import torch
def combine(local, decay):
    joined, carried = [], torch.zeros_like(local[0, 0])
    for piece, a in zip(local, decay):
        joined.append(piece + a.cumprod(0) / a * carried)
        carried = joined[-1][-1]
    return torch.stack(joined)
""",
)

# ---------------------------------------------------------------------------------------------------------
# Training

wsd = Exercise("m3-wsd", "wsd", "Warm-up, stable, decay", stars=1, minutes=15, graded=True)


def _plan(rng):
    warmup, decay = (int(torch.randint(2, 20, (1,), generator=rng)) for _ in range(2))
    return 60, warmup, decay, 0.1


@wsd.part("rises evenly to 1 in the warm-up", points=1)
def _(wsd, rng):
    steps, warmup, decay, floor = _plan(rng)
    for step in range(warmup):
        got = wsd(step, steps, warmup, decay, floor)
        assert abs(got - (step + 1) / warmup) < 1e-12, f"step {step} of {warmup} warm-up steps: {got}"


@wsd.part("knows nothing of its length before the decay", points=2)
def _(wsd, rng):
    steps, warmup, decay, floor = _plan(rng)
    for step in range(warmup, steps - decay + 1):
        got = [wsd(step, n, warmup, decay, floor) for n in (steps, steps + 500)]
        assert got[0] == got[1] == 1, f"step {step}: {got[0]} in a run of {steps}, {got[1]} in a longer one"


@wsd.part("falls in equal parts to the floor", points=1)
def _(wsd, rng):
    steps, warmup, decay, floor = _plan(rng)
    rates = [wsd(step, steps, warmup, decay, floor) for step in range(steps - decay, steps + 1)]
    assert abs(rates[-1] - floor) < 1e-12, f"at the end: {rates[-1]}, expected {floor}"
    falls = [one - two for one, two in itertools.pairwise(rates)]
    assert max(falls) - min(falls) < 1e-9 and falls[0] > 0, "the decay is not even"


wsd.wrong(
    "a cosine",
    """
import math
def wsd(step, steps, warmup, decay, floor):
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
""",
)
wsd.wrong(
    "no warm-up, and a decay to zero",
    """
def wsd(step, steps, warmup, decay, floor):
    return min(1, (steps - step) / decay)
""",
)

dt_bias = Exercise("m3-dt-bias", "dt_bias", "The inverse of the softplus", stars=2, minutes=15)


@dt_bias.part("its softplus is the step, small and large")
def _(dt_bias, rng):
    dt = 10 ** (7.6 * torch.rand(64, generator=rng, dtype=torch.float64) - 6)
    back = torch.nn.functional.softplus(dt_bias(dt), threshold=1e9)
    close(back / dt, torch.ones_like(dt), "softplus(bias) / dt", 1e-8)


@dt_bias.part("does not overflow at a step of 1000")
def _(dt_bias, rng):
    dt = 900 + 100 * torch.rand(4, generator=rng, dtype=torch.float64)
    close(dt_bias(dt), dt, "the bias of a large step", 1e-9)


dt_bias.wrong("the step's logarithm", "import torch\ndef dt_bias(dt):\n    return torch.log(dt)\n")
dt_bias.wrong(
    "by exp, which overflows", "import torch\ndef dt_bias(dt):\n    return torch.log(torch.exp(dt) - 1)\n"
)

# ---------------------------------------------------------------------------------------------------------
# Pre-training

pack = Exercise("m3-pack", "pack", "Documents packed into one row", stars=2, minutes=20, graded=True)


def _documents(rng):
    sizes = torch.randint(1, 7, (4,), generator=rng).tolist()
    return [torch.randint(1, 99, (size,), generator=rng).tolist() for size in sizes]


@pack.part("tokens stand end to end, cut or filled to the length", points=1)
def _(pack, rng):
    documents = _documents(rng)
    flat = [t for document in documents for t in document]
    for length in (len(flat) - 1, len(flat), len(flat) + 5):
        tokens, labels, seq_idx = pack(documents, length)
        assert len(tokens) == len(labels) == len(seq_idx) == length, "a tensor has another length"
        expected = torch.tensor((flat + [0] * 5)[:length])
        assert torch.equal(tokens, expected), f"tokens {tokens.tolist()}, expected {expected.tolist()}"


@pack.part("a label is the next token of the same document", points=2)
def _(pack, rng):
    documents = _documents(rng)
    flat = [t for document in documents for t in document]
    for length in (len(flat) - 1, len(flat) + 5):
        tokens, labels, seq_idx = pack(documents, length)
        for t in range(length):
            follows = t + 1 < min(length, len(flat)) and bool(seq_idx[t] == seq_idx[t + 1])
            expected = int(tokens[t + 1]) if follows else -100
            assert int(labels[t]) == expected, f"label {int(labels[t])} at position {t}, expected {expected}"


@pack.part("every document and the filling have a number of their own", points=1)
def _(pack, rng):
    documents = _documents(rng)
    total = sum(map(len, documents))
    runs = torch.unique_consecutive(pack(documents, total + 5)[2], return_counts=True)[1].tolist()
    expected = [*map(len, documents), 5]
    assert runs == expected, f"stretches of equal seq_idx: {runs}, expected {expected}"


pack.wrong(
    "labels across borders, one document number",
    """
import torch
def pack(documents, length):
    tokens = torch.tensor((sum(documents, []) + [0] * length)[:length])
    return tokens, torch.cat([tokens[1:], torch.tensor([-100])]), torch.zeros(length, dtype=torch.long)
""",
)
pack.wrong(
    "neither cut nor filled",
    """
import torch
def pack(documents, length):
    tokens = sum(documents, [])
    labels = sum(([*d[1:], -100] for d in documents), [])
    number = sum(([k] * len(d) for k, d in enumerate(documents)), [])
    return torch.tensor(tokens), torch.tensor(labels), torch.tensor(number)
""",
)

bits_per_byte = Exercise("m3-bits-per-byte", "bits_per_byte", "Bits per byte", stars=1, minutes=10)


@bits_per_byte.part("a uniform guess among 256 bytes costs 8 bits")
def _(bits_per_byte, rng):
    import math

    text = "a" * int(torch.randint(5, 99, (1,), generator=rng))
    got = bits_per_byte(math.log(256), len(text), text)
    assert abs(got - 8) < 1e-9, f"{got}, expected 8"


@bits_per_byte.part("letters outside ASCII have more than one byte, and fewer tokens cost less")
def _(bits_per_byte, rng):
    one, two = bits_per_byte(1.0, 10, "ü" * 10), bits_per_byte(1.0, 5, "u" * 10)
    assert abs(one - two) < 1e-9, f"{one} and {two}, expected the same"


bits_per_byte.wrong(
    "nats", "def bits_per_byte(loss, tokens, text):\n    return loss * tokens / len(text.encode())\n"
)
bits_per_byte.wrong(
    "characters",
    "import math\n"
    "def bits_per_byte(loss, tokens, text):\n"
    "    return loss / math.log(2) * tokens / len(text)\n",
)
# ---------------------------------------------------------------------------------------------------------
# Fine-tuning

lora = Exercise("m3-lora", "lora", "A low-rank layer", stars=2, minutes=20, graded=True)


def _adapter(rng, r=3):
    shapes = ((2, 4, 7), (5, 7), (r, 7), (5, r))
    return [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes]


@lora.part("the merged matrix gives the same output", points=2)
def _(lora, rng):
    x, W, A, B = _adapter(rng)
    y, merged = lora(x, W, A, B, 8.0)
    close(torch.einsum("mn,bln->blm", merged, x), y, "x merged^T", 1e-10)
    assert (y - x @ W.T).abs().max() > 1e-6, "the adapter does nothing"


@lora.part("a fresh adapter (B = 0) changes nothing", points=1)
def _(lora, rng):
    x, W, A, B = _adapter(rng)
    close(lora(x, W, A, 0 * B, 8.0)[0], torch.nn.functional.linear(x, W), "y with B = 0", 1e-10)


@lora.part("alpha is divided by the rank, so adapters side by side with twice alpha add up", points=1)
def _(lora, rng):
    x, W, A, B = _adapter(rng)
    one = lora(x, W, A, B, 4.0)[1] - W
    two = lora(x, W, torch.cat([A, A]), torch.cat([B, B], 1), 4.0)[1] - W
    close(two, one, "two equal adapters as one of twice the rank", 1e-10)
    expected = torch.tensor([[2.0]], dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    close(lora(ones, 0 * ones, ones, ones, 2.0)[1], expected, "rank 1, alpha 2, everything 1", 1e-12)


lora.wrong(
    "no division by the rank",
    "def lora(x, W, A, B, alpha):\n    M = W + alpha * B @ A\n    return x @ M.T, M\n",
)
lora.wrong(
    "the merged matrix without the scale",
    "def lora(x, W, A, B, alpha):\n    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T), W + B @ A\n",
)
lora.wrong(
    "B moved away from zero",
    "def lora(x, W, A, B, alpha):\n    M = W + alpha / A.shape[0] * (B + 1) @ A\n    return x @ M.T, M\n",
)

last_token = Exercise("m3-last-token", "last_token", "The last token of each row", stars=1, minutes=10)


@last_token.part("what stands behind the last token changes nothing")
def _(last_token, rng):
    x = torch.randn(4, 6, 3, generator=rng, dtype=torch.float64)
    lengths = torch.tensor([1, 3, 6, 5])
    changed = x.clone()
    for row, length in enumerate(lengths.tolist()):
        changed[row, length:] += 1
    got = last_token(x, lengths)
    assert got.shape == (4, 3), f"shape {tuple(got.shape)}, expected (4, 3)"
    close(last_token(changed, lengths), got, "features after changing the filling", 1e-12)


@last_token.part("the last token itself decides")
def _(last_token, rng):
    x = torch.zeros(3, 5, 2, dtype=torch.float64)
    lengths = torch.randint(1, 6, (3,), generator=rng)
    for row, length in enumerate(lengths.tolist()):
        x[row, length - 1] = row + 1
    close(last_token(x, lengths)[:, 0], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "features", 1e-12)


last_token.wrong("the last column", "def last_token(features, lengths):\n    return features[:, -1]\n")
last_token.wrong("the first column", "def last_token(features, lengths):\n    return features[:, 0]\n")

# ---------------------------------------------------------------------------------------------------------
# Evaluation

strided = Exercise(
    "m3-strided", "windows", "Windows for a strided perplexity", stars=2, minutes=20, graded=True
)


@strided.part("every token but the first is judged exactly once", points=2)
def _(windows, rng):
    for _ in range(6):
        total = int(torch.randint(5, 60, (1,), generator=rng))
        length = int(torch.randint(4, 12, (1,), generator=rng))
        stride = int(torch.randint(1, length, (1,), generator=rng))
        judged = sorted(t for _, first, end in windows(total, length, stride) for t in range(first, end))
        assert judged == list(range(1, total)), (
            f"total={total}, length={length}, stride={stride}: judged {judged[:8]}..."
        )


@strided.part("no window is longer than the length, and each moves on by the stride", points=1)
def _(windows, rng):
    stride = int(torch.randint(1, 5, (1,), generator=rng))
    found = windows(53, 9, stride)
    assert all(end - start <= 9 and start < first for start, first, end in found), (
        "a window has a wrong length"
    )
    starts = [start for start, _, _ in found]
    assert starts == list(range(0, stride * len(starts), stride)), f"windows start at {starts[:5]}..."


@strided.part("a text that fits has one window", points=1)
def _(windows, rng):
    total = int(torch.randint(3, 9, (1,), generator=rng))
    got = [tuple(w) for w in windows(total, 9, 4)]
    assert got == [(0, 1, total)], f"{got}, expected one window {(0, 1, total)}"


strided.wrong(
    "overlaps judged twice",
    """
def windows(total, length, stride):
    return [(s, s + 1, min(s + length, total)) for s in range(0, max(total - length, 0) + stride, stride)]
""",
)
strided.wrong(
    "cut without overlap",
    """
def windows(total, length, stride):
    return [(s, s + 1, min(s + length, total)) for s in range(0, total, length) if s + 1 < total]
""",
)
strided.wrong(
    "no window at all where the text fits",
    """
def windows(total, length, stride):
    return [(s, s + 1, s + length) for s in range(0, total - length, stride)]
""",
)

choose = Exercise("m3-choose", "choose", "acc and acc_norm", stars=1, minutes=15)


@choose.part("by the sum: the likelier continuation")
def _(choose, rng):
    for _ in range(8):
        scores = -10 * torch.rand(4, generator=rng, dtype=torch.float64)
        got = choose(scores.tolist(), ["a", "bb", "ccc" * 9, "dddd"])[0]
        assert got == int(scores.argmax()), f"chose {got} by the sum, scores {scores.tolist()}"


@choose.part("by the mean: a score of -1 per character wins against -2, however long")
def _(choose, rng):
    for best in range(3):
        texts = ["x" * int(n) for n in torch.randint(1, 30, (3,), generator=rng)]
        scores = [-(1 if k == best else 2) * len(text) for k, text in enumerate(texts)]
        got = choose(scores, texts)[1]
        assert got == best, f"chose {got} by the mean, expected {best}"
    assert choose([-6, -10], ["a" * 4, "a" * 20])[1] == 1, "-10 for 20 characters beats -6 for 4"
    assert choose([-6, -10], ["abcd", "a" * 20])[1] == 1, (
        "-10 for 20 characters is more per character than -6 for 4"
    )


choose.wrong(
    "the sum twice",
    "def choose(scores, texts):\n    best = scores.index(max(scores))\n    return best, best\n",
)
choose.wrong(
    "the mean twice",
    "def choose(scores, texts):\n    mean = [s / len(t) for s, t in zip(scores, texts)]\n"
    "    best = mean.index(max(mean))\n    return best, best\n",
)

# ---------------------------------------------------------------------------------------------------------
# Falcon Mamba

norms = Exercise(
    "m3-inner-norms", "normalised", "The three norms of Falcon Mamba", stars=2, minutes=15, graded=True
)


@norms.part("the size of the input does not matter", points=1)
def _(normalised, rng):
    x = torch.randn(2, 3, 8, generator=rng, dtype=torch.float64)
    for one, two in zip(normalised(x, 2, 3), normalised(100 * x, 2, 3), strict=True):
        close(two, one, "the parts of 100 x", 1e-4)


@norms.part("each of the three has a mean square of one", points=2)
def _(normalised, rng):
    x = torch.randn(2, 3, 8, generator=rng, dtype=torch.float64)
    x = x * torch.tensor([1.0, 1, 10, 10, 10, 50, 50, 50], dtype=torch.float64)
    for name, part in zip(("dt", "B", "C"), normalised(x, 2, 3), strict=True):
        close(part.square().mean(-1), torch.ones(2, 3, dtype=torch.float64), f"mean square of {name}", 1e-4)


@norms.part("directions stay: no mean is taken away", points=1)
def _(normalised, rng):
    x = torch.rand(2, 3, 8, generator=rng, dtype=torch.float64) + 0.5
    for got, part in zip(normalised(x, 2, 3), x.split([2, 3, 3], -1), strict=True):
        cosine = torch.nn.functional.cosine_similarity(got, part, dim=-1)
        close(cosine, torch.ones_like(cosine), "cosine of a part before and after", 1e-9)


norms.wrong("only split", "def normalised(x, rank, n):\n    return x.split([rank, n, n], -1)\n")
norms.wrong(
    "one norm for all",
    "def normalised(x, rank, n):\n"
    "    return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).split([rank, n, n], -1)\n",
)
norms.wrong(
    "layer norms",
    "import torch\ndef normalised(x, rank, n):\n"
    "    return [torch.nn.functional.layer_norm(p, p.shape[-1:]) for p in x.split([rank, n, n], -1)]\n",
)

count = Exercise("m3-count", "parameters", "Falcon Mamba's parameters", stars=2, minutes=20)


@count.part("as many as the published model has")
def _(parameters, rng):
    got = parameters(64, 4096, 65024, n=16, rank=256, tied=False)
    assert got == 7_272_665_088, f"{got:,}, expected 7,272,665,088"


@count.part("as many as the library's model has, tied and untied, of any size")
def _(parameters, rng):
    from mambakit import LanguageModel, LanguageModelConfig
    from mambakit.layers import Mamba1Config

    layers, n, rank = torch.randint(1, 5, (3,), generator=rng).tolist()
    for tied in (True, False):
        mixer = Mamba1Config(d_state=n, dt_rank=rank)
        config = LanguageModelConfig(
            vocab_size=31, d_model=8, pattern=f"{layers}M", mixers={"M": mixer}, tie_embeddings=tied
        )
        expected = sum(p.numel() for p in LanguageModel(config).parameters())
        got = parameters(layers, 8, 31, n=n, rank=rank, tied=tied)
        assert got == expected, f"{layers} layers, n={n}, rank={rank}: {got}, expected {expected}"


count.wrong(
    "the projections only",
    "def parameters(layers, d, v, n, rank, tied):\n"
    "    return layers * 6 * d * d + (1 if tied else 2) * v * d\n",
)
count.wrong(
    "always tied",
    "def parameters(layers, d, v, n, rank, tied):\n    e = 2 * d\n"
    "    block = 2*d*e + 5*e + e*(rank + 2*n) + rank*e + e + e*n + e + e*d + d\n"
    "    return layers * block + v * d + d\n",
)

# ---------------------------------------------------------------------------------------------------------
# Checkpoints

names = Exercise("m3-names", "translate", "Names of a Mamba checkpoint", stars=1, minutes=15)


@names.part("a model of transformers, translated, is the library's model: the same names")
def _(translate, rng):
    from mambakit import LanguageModel, LanguageModelConfig
    from mambakit.layers import Mamba1Config

    layers = int(torch.randint(1, 13, (1,), generator=rng))
    config = LanguageModelConfig(vocab_size=7, d_model=4, pattern=f"{layers}M", mixers={"M": Mamba1Config()})
    ours = set(LanguageModel(config, device="meta").state_dict()) - {"lm_head.weight"}
    theirs = {"backbone.embeddings.weight", "backbone.norm_f.weight"}
    parts = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias")
    parts += ("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", "mixer.D")
    theirs |= {f"backbone.layers.{i}.{p}" for i in range(layers) for p in (*parts, "mixer.out_proj.weight")}
    got = {translate(name) for name in theirs}
    assert got == ours, f"missing {sorted(ours - got)[:3]}, unknown {sorted(got - ours)[:3]}"


names.wrong("unchanged", "def translate(name):\n    return name\n")
names.wrong(
    "the bias of the step forgotten",
    "def translate(name):\n"
    "    name = name.replace('backbone.embeddings', 'embedding').replace('.layers.', '.blocks.')\n"
    "    for part in ('x_proj', 'dt_proj', 'A_log', 'D'):\n"
    "        name = name.replace(f'mixer.{part}', f'mixer.ssm.{part}')\n"
    "    return name\n",
)

state_bytes = Exercise(
    "m3-state-bytes", "state_bytes", "What a pure Mamba remembers, in bytes", stars=1, minutes=15, graded=True
)


@state_bytes.part("as many bytes as the library's state", points=2)
def _(state_bytes, rng):
    from mambakit import LanguageModel, LanguageModelConfig
    from mambakit.layers import Mamba1Config

    layers, n, width = (torch.randint(2, 6, (3,), generator=rng)).tolist()
    mixer = Mamba1Config(d_state=n, d_conv=width)
    config = LanguageModelConfig(vocab_size=7, d_model=8, pattern=f"{layers}M", mixers={"M": mixer})
    for batch in (1, 3):
        expected = LanguageModel(config).init_state(batch).nbytes
        expected = expected() if callable(expected) else expected
        got = state_bytes(layers, 8, n, width, batch)
        assert got == expected, f"{got} bytes, expected {expected}"


@state_bytes.part("twice the layers, twice the bytes", points=1)
def _(state_bytes, rng):
    one, two = state_bytes(8, 64, 16, 4, 1), state_bytes(16, 64, 16, 4, 1)
    assert two == 2 * one > 0, f"8 layers {one} bytes, 16 layers {two}"


state_bytes.wrong(
    "the convolution forgotten",
    "def state_bytes(layers, d, n, width, batch):\n    return layers * batch * 2 * d * n * 4\n",
)
state_bytes.wrong(
    "one layer",
    "def state_bytes(layers, d, n, width, batch):\n    return batch * 2 * d * (n + width - 1) * 4\n",
)

temperature = Exercise("m3-temperature", "scaled_rate", "A constant temperature", stars=1, minutes=10)


@temperature.part("eta / sqrt(b) is the same at every batch size, and the peak belongs to the full batch")
def _(scaled_rate, rng):
    batch = int(torch.randint(1, 2000, (1,), generator=rng))
    one, full = scaled_rate(6.4e-4, batch, 2048), scaled_rate(6.4e-4, 2048, 2048)
    assert abs(full - 6.4e-4) < 1e-12, f"at the full batch {full}, expected 6.4e-4"
    assert abs(one / batch**0.5 - full / 2048**0.5) < 1e-12, f"another temperature at a batch of {batch}"


temperature.wrong("linear", "def scaled_rate(peak, batch, full):\n    return peak * batch / full\n")
temperature.wrong("constant rate", "def scaled_rate(peak, batch, full):\n    return peak\n")
