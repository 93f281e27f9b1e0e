"""Gradients through captured maps: right with grad=True, refused without, never a silent zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flashmaps as fm
import pytest
import torch
from tiny_pipeline import tiny_unet
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "up_blocks.*"


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(1, 4, 8, 8).requires_grad_(), torch.randn(1, 5, 32)


def loss_of(record: Any) -> Tensor:
    self_map, cross = record.select(kind="self"), record.select(kind="cross")
    found = self_map[0].map().entropy().mean() + cross[0].map().column_sum()[:, 1].sum()
    return found + self_map[-1].map().expectation().square().mean()


def gradient(unet: Any, weight: float, **options: Any) -> Tensor:
    latent, text = inputs()
    with fm.capture(unet, UP, keep="qk", **options) as record:
        out = unet(latent, 7, encoder_hidden_states=text).sample
    loss = out.square().mean() + weight * loss_of(record)
    return torch.autograd.grad(loss, latent)[0]


class Dense:
    """The same loss by an attention processor that builds its maps, in plain torch."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(context))
        weights = (attn.scale * query @ key.mT).softmax(-1)
        self.kept.append(weights.mean(1))
        out = (weights @ heads(attn.to_v(context))).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def test_gradients_are_those_of_dense_maps() -> None:
    unet = tiny_unet().double()
    latent, text = (x.detach().double() for x in inputs())
    latent.requires_grad_()
    with fm.capture(unet, UP, keep="qk", grad=True) as record:
        unet(latent, 7, encoder_hidden_states=text)
    (mine,) = torch.autograd.grad(loss_of(record), latent)
    layers = [entry.layer for entry in record]
    kept: list[Tensor] = []
    for name, layer in fm.capture(unet, UP)._layers.items():
        assert name in layers
        layer.set_processor(Dense(kept))
    unet(latent, 7, encoder_hidden_states=text)
    maps = [m for m, entry in zip(kept, record, strict=True) if entry.kind == "self"]
    cross = [m for m, entry in zip(kept, record, strict=True) if entry.kind == "cross"]
    side = record.select(kind="self")[-1].grid
    y, x = torch.meshgrid(*((torch.arange(n).double() + 0.5) / n for n in side), indexing="ij")
    at = torch.stack((x.flatten(), y.flatten()), -1)
    loss = -(maps[0] * maps[0].log()).sum(-1).mean() + cross[0].sum(1)[:, 1].sum()
    loss = loss + (maps[-1] @ at).square().mean()
    (wanted,) = torch.autograd.grad(loss, latent)
    torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


def test_checkpointing_gives_the_same_bits() -> None:
    unet = tiny_unet()
    plain = gradient(unet, 1.0, grad=True)
    unet.train()
    unet.enable_gradient_checkpointing()
    assert torch.equal(gradient(unet, 1.0, grad=True), plain)


def test_without_it_a_gradient_raises_and_names_it() -> None:
    with pytest.raises(RuntimeError, match="grad=True"):
        gradient(tiny_unet(), 1.0)
    assert gradient(tiny_unet().requires_grad_(False), 0.0, grad=True).abs().sum() > 0


@pytest.mark.parametrize("keep", ["mean", "statistics"])
def test_statistics_raise_too(keep: str) -> None:
    unet, (latent, text) = tiny_unet().requires_grad_(False), inputs()
    with fm.capture(unet, UP, kind="self", reduce="entropy", keep=keep) as record:
        for _ in range(2):
            unet(latent, 7, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match="grad=True"):
        torch.autograd.grad(record[0].entropy.mean(), latent)
    with pytest.raises(RuntimeError, match="grad=True"):
        record[0].entropy.mean().backward()
    assert record[0].entropy.detach().isfinite().all()


def test_processors_raise_too() -> None:
    unet, (latent, text) = tiny_unet().requires_grad_(False), inputs()
    with fm.MapAttnProcessor.on(unet, UP) as record:
        unet(latent, 7, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match="grad=True"):
        torch.autograd.grad(record[0].entropy.mean(), latent)


@pytest.mark.filterwarnings("ignore:nothing was recorded")
def test_no_graph_where_autograd_is_off() -> None:
    unet, (latent, text) = tiny_unet(), inputs()
    with torch.no_grad(), fm.capture(unet, UP) as record:
        unet(latent, 7, encoder_hidden_states=text)
    assert not record[0].query.requires_grad
    off: Callable[[], Any]
    for off in (torch.no_grad, torch.inference_mode):
        with off(), fm.capture(unet, UP, keep="qk", grad=True) as record:
            with pytest.raises(RuntimeError, match="autograd is off where layer"):
                unet(latent, 7, encoder_hidden_states=text)


def test_options_that_keep_no_graph_are_refused() -> None:
    unet = tiny_unet()
    for options in ({"reduce": "entropy"}, {"keep": "mean", "reduce": "entropy"}, {"to": "x"}):
        with pytest.raises(ValueError, match="grad=True keeps Q and K with their graph"):
            fm.capture(unet, UP, grad=True, **options)  # type: ignore[arg-type]
