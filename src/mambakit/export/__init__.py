"""Models as files for other programs: ONNX graphs, and GGUF for llama.cpp.

    from mambakit.export import export_gguf, export_onnx
    export_onnx(model, "folder")
    export_gguf(model, "model.gguf", dtype="q8_0")

Both need the packages of the extra `export`, which are imported when they are used.
"""

from mambakit.export.gguf import export_gguf
from mambakit.export.onnx import export_onnx

__all__ = ["export_gguf", "export_onnx"]
