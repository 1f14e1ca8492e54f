"""Which layers are tried, and what the report says of the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.nn import utils
from torch.nn.utils import parametrizations
from torch_cases import Clock, check_round_trip, mlp, pruned

import torch
from sparsam.torch import restore
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


class Experts(nn.Module):
    """Several matrices in one Parameter, and one Parameter of as many axes that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("bi,eoi->beo", x, self.experts)
        return torch.einsum("be,beo->bo", self.router(x).softmax(1), each)


def test_experts_in_one_parameter_are_listed() -> None:
    report = check_round_trip(pruned(nn.Sequential(Experts())), torch.randn(5, 8))
    assert [(r.name, r.kind, r.shape, r.swapped, r.reason) for r in report.layers] == [
        ("0.experts", "Experts", (4, 8, 8), False, "no kernel for 4 matrices in one Parameter"),
        ("0.router", "Linear", (4, 8), True, ""),
    ]


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_weights_of_other_layouts_are_left(layout: str) -> None:
    model = mlp(nn.Tanh)
    weight = model.get_parameter("0.weight").detach()
    other = weight.to_mkldnn() if layout == "_mkldnn" else weight.to_sparse(layout=getattr(torch, layout))
    model[0].weight = nn.Parameter(other, requires_grad=False)  # type: ignore[index]
    report = accelerate(model)
    assert [(r.swapped, r.reason) for r in report.layers] == [(False, f"its weight is {layout}"), (True, "")]
    assert restore(model) == 1
    assert model[0].weight.layout is getattr(torch, layout)  # type: ignore[index]


COMPUTED: dict[str, Callable[..., nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over a row": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": utils.weight_norm,
    "old spectral_norm": utils.spectral_norm,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(12, 12),
    "Conv1d": lambda: nn.Conv1d(12, 12, 3, padding=1, groups=2),
    "Conv2d": lambda: nn.Conv2d(12, 12, 3, padding=1),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(12, 12, 3, padding=1),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", COMPUTED)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_computed_weights(norm: str, layer: str) -> None:
    """Each is packed or left with a reason, once, and the model answers as before."""
    model = nn.Sequential(LAYERS[layer](), nn.Tanh(), COMPUTED[norm](LAYERS[layer]()))
    x = torch.randn(*{"Linear": (5,), "Conv2d": (2, 12, 7)}.get(layer, (2, 12)), 12)
    dense = pruned(model)(x)
    density = torch.count_nonzero(model[2].weight) / model[2].weight.numel()  # type: ignore[arg-type, operator]
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = accelerate(model, x)
    if norm.startswith("old"):
        reason = f"its weight is computed by a hook of torch.nn.utils, {type_of_hook(model[2])}"
    else:
        reason = "too few zeros" if density > 0.9 else ""
    assert [(r.name, r.kind, r.reason) for r in report.layers][1:] == [("2", layer, reason)]
    assert float(difference(model(x), dense) or 0) < 1e-5
    model.load_state_dict(model.state_dict())
    assert restore(model) == report.swapped
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    torch.testing.assert_close(model(x), dense)


def type_of_hook(layer: nn.Module) -> str:
    (hook,) = layer._forward_pre_hooks.values()
    return type(hook).__name__


class Pairs(nn.Module):
    """A layer of a kind that has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(24, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(x, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.ReLU()), "the model has no layer of a kind that can be packed"),
        (nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), "too few zeros (2 layers)"),
        (mlp().double(), "its weight is float64 (2 layers)"),
        (Pairs(), "no kernel for Bilinear (1 layer)"),
    ],
)
def test_the_closing_line_tells_why_nothing_was_swapped(model: nn.Module, why: str) -> None:
    x = torch.randn(5, 24, dtype=next((p.dtype for p in model.parameters()), None))
    assert accelerate(model, x).summary == f"nothing swapped: {why}"


def test_the_closing_line_tells_that_all_is_packed() -> None:
    model = mlp()
    accelerate(model, torch.randn(5, 24))
    assert accelerate(model).summary == "nothing swapped: packed already (2 layers)"


def test_the_closing_line_tells_that_nothing_gains(clock: Clock) -> None:
    clock.gains = {"0": 0.5, "2": 0.9}
    assert accelerate(mlp(), torch.randn(5, 24)).summary == "nothing swapped: gain under 1.05 (2 layers)"
