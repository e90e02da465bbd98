"""The decode engine: one token through a whole language model in one native call, on a CPU.

Producing a token reads every weight once, so its time is the memory's: the engine copies all weights into one
arena of huge pages, in the order in which they are read, each thread reading one stream; in bfloat16, 8 or 4
bits where asked for. All blocks, norms, convolutions, recurrences and the head run inside one parallel
region, on PyTorch's threads. The engine takes a built model from outside, which does not know of it, and
overwrites the very `State` that the model's forward uses, so that a sequence may go from one to the other at
any token.

    engine = DecodeEngine(model, "int8")
    state = model.init_state(1)
    model(prompt, state)
    logits = engine.step(token, state)  # (1, v)

`docs/decoding.md` says how to use it, its limits, and what the forms of the weights cost in accuracy.
"""

from mambakit.generation.engine.choice import engine_for
from mambakit.generation.engine.engine import DecodeEngine
from mambakit.generation.engine.program import MOST_BATCH
from mambakit.generation.engine.scoring import DecodedModel
from mambakit.generation.engine.weights import FORMS, Form

__all__ = ["FORMS", "MOST_BATCH", "DecodeEngine", "DecodedModel", "Form", "engine_for"]
