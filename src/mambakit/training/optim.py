"""The optimiser with its parameters sorted by rule, and its state as named tensors.

The rule (Gu and Dao, 2023, section E.2.1; the attribute `_no_weight_decay` of the published code is set there
and read by nobody, so models trained with plain AdamW decay their dynamics):

    ssm        listed in its module's `ssm_parameters` (A_log, D, dt_bias...): no decay, own rate `ssm_lr`
    no decay   everything else with fewer than two axes: biases and norm gains
    decay      the rest: matrices, embeddings, convolution filters
    muon       with `name: muon`, the matrices of the backbone out of `decay`, at their own rate `muon_lr`

A_log is a matrix in Mamba-1 and a vector in Mamba-2, which is why the number of axes alone is not enough.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mambakit.config import Config, unknown
from mambakit.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter, 2019), or Muon (Jordan et al., 2024) with AdamW beside it.

    Args:
        name: `adamw`, or `muon`: orthogonalised momentum for the matrices of the backbone, AdamW for
            embeddings, head, convolutions, vectors and state-space parameters.
        lr: Peak learning rate.
        ssm_lr: Peak learning rate of the parameters that mixers list in `ssm_parameters`; None means `lr`.
            S4 needs about 1e-3 there whatever the rest learns with.
        muon_lr: Peak learning rate of Muon's matrices; about 0.01 whatever their size.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of the decay and muon groups, per unit of learning rate.

    Raises:
        ValueError: A number out of range.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    ssm_lr: float | None = None
    muon_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Refuse names and numbers that mean nothing."""
        if self.name not in ("adamw", "muon"):
            raise ValueError(unknown("optimizer", self.name, ["adamw", "muon"]))
        for key in ("lr", "ssm_lr", "muon_lr", "eps"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key} is {value}, expected a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected two numbers in [0, 1)")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number >= 0")


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike.

    Args:
        name: `decay`, `no decay`, `ssm` or `muon`.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        parameters: Name in the model -> parameter.
    """

    name: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    @property
    def row(self) -> dict[str, Any]:
        """One line of the table shown at the start of a run: name, lr, weight_decay, tensors, elements."""
        return {
            "name": self.name,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "tensors": len(self.parameters),
            "elements": sum(p.numel() for p in self.parameters.values()),
        }

    def describe(self) -> str:
        """The same in words."""
        row = self.row
        return (
            f"{row['name']}: {row['tensors']} tensors, {row['elements']:,} parameters, "
            f"lr {self.lr:g}, weight decay {self.weight_decay:g}"
        )


def groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """Sort a model's trainable parameters into groups, each parameter into exactly one.

    Args:
        model: Any module; modules in it may list local (dotted) parameter names in `ssm_parameters`.
        config: Rates and decay.

    Returns:
        The non-empty groups among `decay`, `no decay`, `ssm` and `muon`, in this order.

    Raises:
        ValueError: A module lists a parameter that it does not have.
    """
    ssm = {id(p) for module in model.modules() for p in _listed(module)}
    sorted_in: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no decay": {}, "ssm": {}, "muon": {}}
    inside = _matrices(model) if config.name == "muon" else set()
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        if parameter.requires_grad:
            kind = "ssm" if id(parameter) in ssm else "no decay" if parameter.ndim < 2 else "decay"
            kind = "muon" if kind == "decay" and id(parameter) in inside else kind
            sorted_in[kind][name] = parameter
    rates = {
        "decay": (config.lr, config.weight_decay),
        "no decay": (config.lr, 0.0),
        "ssm": (config.lr if config.ssm_lr is None else config.ssm_lr, 0.0),
        "muon": (config.muon_lr, config.weight_decay),
    }
    return [Group(kind, *rates[kind], found) for kind, found in sorted_in.items() if found]


def build(
    parameter_groups: list[Group], config: OptimizerConfig, *, capturable: bool = False
) -> torch.optim.AdamW:
    """Build the optimiser over the groups, AdamW fused into one kernel where every parameter allows it.

    Args:
        parameter_groups: From `groups`.
        config: Which optimiser, betas and eps.
        capturable: Keep the learning rates in tensors, as a step recorded in a CUDA graph needs them.

    Returns:
        The optimiser; each of its `param_groups` carries `peak_lr` for `set_rates`.
    """
    parameters = [p for group in parameter_groups for p in group.parameters.values()]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    kind = Muon if config.name == "muon" else torch.optim.AdamW
    return kind(
        [
            {
                "params": list(group.parameters.items()),
                "lr": torch.tensor(group.lr, device=parameters[0].device) if capturable else group.lr,
                "peak_lr": group.lr,
                "weight_decay": group.weight_decay,
                **({"muon": group.name == "muon"} if kind is Muon else {}),
            }
            for group in parameter_groups
        ],
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        capturable=capturable,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def pack(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the optimiser's state into tensors named `parameter/quantity`, ready for safetensors.

    Hyperparameters are left out: they follow from the configuration.
    """
    return {
        f"{name}/{quantity}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for quantity, value in optimizer.state.get(parameter, {}).items()  # none before its first gradient
    }


def unpack(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `pack` returned into an optimiser over the same parameter names.

    Raises:
        ValueError: A tensor belongs to a parameter that the optimiser does not have.
    """
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        state.setdefault(name, {})[quantity] = value
    if strange := sorted(set(state) - set(names)):
        raise ValueError(f"the saved optimiser state has {', '.join(strange[:3])}, unknown to the model")
    packed = optimizer.state_dict()
    packed["state"] = {index: state[name] for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict(packed)


def _matrices(model: nn.Module) -> set[int]:
    """Identities of the weights of linear layers inside the backbone."""
    inside = getattr(model, "backbone", model)
    return {id(m.weight) for m in inside.modules() if isinstance(m, nn.Linear)}


def _listed(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module itself calls state-space parameters."""
    found = []
    for name in sorted(getattr(module, "ssm_parameters", ())):
        try:
            parameter = operator.attrgetter(name)(module)
        except AttributeError:
            valid = [key for key, _ in module.named_parameters()]
            raise ValueError(
                f"{type(module).__name__}.ssm_parameters: {unknown('parameter', name, valid)}"
            ) from None
        if parameter is not None:  # an optional parameter that this configuration leaves out
            found.append(parameter)
    return found
