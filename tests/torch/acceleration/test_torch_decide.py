"""What is decided from times; no model runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsam.torch.acceleration.decision import Decision, decide, families
from sparsam.torch.acceleration.measurement import LayerTime, Times

GAIN = 1.05


def of(
    layers: dict[str, LayerTime],
    fused: list[tuple[str, ...]] | None = None,
    fast: dict[str, float] | None = None,
) -> Decision:
    return decide(Times(layers, fast or {}), fused=fused or [], min_gain=GAIN)


def test_what_gains_enough_is_swapped() -> None:
    found = of({"a": LayerTime(1.05, 1.0), "b": LayerTime(1.04, 1.0)})
    assert found.swap == ("a",)
    assert found.reasons == {"b": "gain under 1.05"}


def test_a_layer_that_wins_only_when_fused_is_swapped() -> None:
    layers = {"a": LayerTime(1.5, 1.0, activation=0.6)}
    assert of(layers, [("a",)]).swap == ("a",)
    assert layers["a"].alone().dense == 0.9


def test_an_activation_of_several_layers_is_fused_into_all_or_none() -> None:
    layers = {
        "wins alone": LayerTime(2.0, 1.0, activation=0.5),
        "wins fused": LayerTime(1.2, 1.0, activation=0.5),
        "loses": LayerTime(1.0, 1.0, activation=0.5),
    }
    found = of(layers, [tuple(layers)])
    assert found.swap == ("wins alone",)
    assert found.times["wins alone"] == LayerTime(1.5, 1.0)
    assert of(layers, [("wins alone", "wins fused")]).swap == ("wins alone", "wins fused")


def test_layers_are_counted_with_the_fast_path_they_lose() -> None:
    layers = {
        "encoder.0.a": LayerTime(2.0, 1.0),
        "encoder.0.b": LayerTime(2.0, 1.0),
        "c": LayerTime(2.0, 1.0),
    }
    assert of(layers, fast={"encoder": 1.9}).swap == tuple(layers)
    found = of(layers, fast={"encoder": 2.0})
    assert found.swap == ("c",)
    assert found.reasons["encoder.0.a"] == "saves less than the fast path of encoder, which it would lose"
    assert of(layers, fast={"": 3.0}).swap == ()
    assert of({**layers, "encoder.0.a": LayerTime(1.0, 1.0)}, fast={"encoder": 1.0}).swap == ("c",)


def test_like_layers_are_a_family() -> None:
    shapes = {"h.0.q": (4, 4), "h.0.up": (8, 4), "h.1.q": (4, 4), "h.1.up": (8, 4), "h.2.q": (5, 4)}
    assert families(shapes) == [("h.0.q", "h.1.q"), ("h.0.up", "h.1.up"), ("h.2.q",)]
    assert families({"0": (4, 4), "2": (4, 4)}) == [("0",), ("2",)]
    assert families({}) == []


@given(
    times=st.lists(
        st.builds(LayerTime, st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 0.1)),
        min_size=1,
        max_size=8,
    ),
    groups=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    lost=st.floats(0, 5),
)
def test_every_layer_is_swapped_or_has_a_reason(
    times: list[LayerTime], groups: list[int], lost: float
) -> None:
    layers = {f"{i % 2}.{i}": one for i, one in enumerate(times)}
    together = [[n for n, g in zip(layers, groups, strict=False) if g == group] for group in (1, 2, 3)]
    found = of(layers, [tuple(group) for group in together if group], {"0": lost})
    assert set(found.swap) | found.reasons.keys() == layers.keys()
    assert not set(found.swap) & found.reasons.keys()
    for name in found.swap:
        assert found.times[name].dense >= GAIN * found.times[name].packed
    inside = [found.times[name].saved for name in found.swap if name.startswith("0.")]
    assert not inside or sum(inside) > lost
