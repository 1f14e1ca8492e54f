from __future__ import annotations

import pytest
from fused_models import CASES, fused_names, made
from torch_cases import Clock

import torch
from sparsam.torch import accelerate, restore
from sparsam.torch.layers.packing import is_packed
from torch import nn

pytestmark = pytest.mark.usefixtures("fusing", "one_thread")


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_packed(module)}


@pytest.mark.parametrize("wins", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_does_not_win_by_itself(name: str, wins: bool, clock: Clock) -> None:
    """It is packed where the module around it can be fused with it, and the model is faster."""
    model, x, modules = made(name)
    layers = [n for n, one in model.named_modules() if isinstance(one, nn.Linear)]
    slow = next(n for n in reversed(layers) if any(not m or n.startswith(f"{m}.") for m in modules))
    clock.gains, clock.wider = {slow: 1.0}, 2.0 if wins else 1.0
    with torch.no_grad():
        wanted = model(**x)
    report = accelerate(model, x, verbose=False)
    row = next(row for row in report.layers if row.name == slow)
    assert row.swapped is wins
    assert (slow in packed_names(model)) is wins
    assert row.reason == ("" if wins else "gain under 1.05")
    if wins:
        assert fused_names(model) == modules
        assert report.fused is not None
        assert tuple(sorted(report.fused.modules)) == modules
    else:
        assert fused_names(model) != modules
    with torch.no_grad():
        found = model(**x)
    first, expected = (one if isinstance(one, torch.Tensor) else one[0] for one in (found, wanted))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)
    restore(model)
    assert packed_names(model) == set()
    assert fused_names(model) == ()


def test_slow_layers_outside_of_fused_modules_stay_dense(clock: Clock) -> None:
    model, x, _ = made(next(iter(CASES)))
    layers = {n for n, one in model.named_modules() if isinstance(one, nn.Linear)}
    clock.gains, clock.wider = dict.fromkeys(layers, 1.0), 2.0
    report = accelerate(model, x, verbose=False)
    assert not any(row.swapped for row in report.layers)
    assert report.fused is None
    assert fused_names(model) == ()
