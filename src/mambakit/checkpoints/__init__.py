"""Published checkpoints: names and tensors, without any model.

`mapping` tells which of their tensors are which of ours, in both directions; `transforms` are the few ways in
which a tensor differs; `files` reads and writes checkpoint folders; `hub` finds a folder by the name of a
repository.
"""

from mambakit.checkpoints.files import CheckpointError, Tensors, open_tensors, read_config, write_checkpoint
from mambakit.checkpoints.hub import locate
from mambakit.checkpoints.mapping import Row, Source, sources

__all__ = [
    "CheckpointError",
    "Row",
    "Source",
    "Tensors",
    "locate",
    "open_tensors",
    "read_config",
    "sources",
    "write_checkpoint",
]
