"""Reading takes the memory of one piece, however long the prompt is."""

from __future__ import annotations

import subprocess
import sys

import pytest

PEAKS = """
import re, torch, mambakit
from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config

mixers = {"M": Mamba2Config(d_state=8, headdim=16), "S": Mamba1Config(d_state=8)}
mixers["W"] = AttentionConfig(n_heads=2, window=64)  # whole attention remembers every token, and grows
config = mambakit.LanguageModelConfig(vocab_size=4096, d_model=64, pattern="MSW-", mixers=mixers)
model = mambakit.LanguageModel(config)

def peak(length, chunk):
    tokens = torch.randint(4096, (2, length))
    mambakit.generate(model, tokens, max_tokens=2, prefill_chunk=chunk)
    # Not ru_maxrss, which a process inherits from the one that started it.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1]) << 10

peak(256, 512)
peaks = [peak(2048, 512), peak(8192, 512), peak(8192, 8192)]
print(peaks[1] - peaks[0], peaks[2] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
def test_four_times_the_prompt_takes_no_more_memory():
    done = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    in_pieces, whole = map(int, done.stdout.split())
    tokens = 2 * 8192 * 8  # the prompt itself
    assert in_pieces < 4 * tokens + (4 << 20)
    assert whole > 20 << 20, "reading it whole takes little more: the test would not notice"
