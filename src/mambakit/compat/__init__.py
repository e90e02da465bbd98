"""The names of mamba_ssm and causal_conv1d, with our operators behind them, on any device.

    import mambakit.compat
    mambakit.compat.install()

    from mamba_ssm import Mamba2                      # ours from here on
    from causal_conv1d import causal_conv1d_fn
    from transformers import MambaForCausalLM         # runs on our kernels, too

`install` puts modules of these names where Python looks for imported ones, and our functions where
transformers' own Mamba models look for kernels; `uninstall` takes both away again. Nothing happens on import.

Signatures, shapes and parameter names are theirs. What our operators cannot do raises `NotImplementedError`
or `ValueError` with the argument's name; no argument is ignored, unless it chooses between implementations of
one result (`chunk_size`, `use_fast_path`, `use_mem_eff_path`, `checkpoint_lvl`, `fused_add_norm`).
"""

from mambakit.compat.installation import MODULES, install, uninstall

__all__ = ["MODULES", "install", "uninstall"]
