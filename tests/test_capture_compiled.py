"""Capture of compiled models: the same bits, the same records, and the first graph afterwards."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import flashmaps as fm
import pytest
import torch
from flashmaps.diffusion.capture import capture, find_layers
from flashmaps.diffusion.compiled import _observe
from flashmaps.diffusion.observe import attention_layers
from tiny_adapters import (
    GainProcessor,
    MatmulProcessor,
    ModuleProcessor,
    add_ip_adapter,
    add_lora,
    image_prompts,
    set_processors,
)
from tiny_models import FAMILIES, FAMILY
from tiny_pipeline import tiny_unet
from torch._dynamo.utils import counters

WAYS = ("torch.compile", "compile", "compile_repeated_blocks")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(autouse=True)
def fresh(one_thread: None) -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def small_unet(**changes: Any) -> Any:
    """Two levels, attention on the finest and in the middle: eight layers."""
    layout: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
    }
    return tiny_unet(**{**layout, **changes})


def compiled(model: Any, way: str, backend: str = "eager", **options: Any) -> Any:
    """The model as its user holds it after compiling it in one of the three ways."""
    options = {"backend": backend, "fullgraph": True, **options}
    if way == "torch.compile":
        return torch.compile(model, **options)
    getattr(model, way)(**options)
    return model


def call(unet: Any, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    torch.manual_seed(3)
    return unet(torch.randn(2, 4, *size), 7, encoder_hidden_states=torch.randn(2, 5, 32)).sample


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def facts(record: Any) -> list[tuple]:
    return [
        (e.layer, e.step, e.kind, e.grid, e.guidance, e.queries, e.keys, e.scale, e.rotated,
         e.rotary is None, e.timestep)
        for e in record
    ]  # fmt: skip


def alike(record: Any, eager: Any, tolerance: float = 0.0) -> None:
    """The same layers in the same order, and the same q, k, masks and rotary embeddings."""
    assert facts(record) == facts(eager)
    for ours, theirs in zip(record, eager, strict=True):
        for a, b in (
            (ours.query, theirs.query),
            (ours.key, theirs.key),
            (ours._mask, theirs._mask),
            *zip(ours.rotary or (), theirs.rotary or (), strict=True),
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- nothing changes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[:2]), WAYS[2]]
)
def test_output_is_the_same_and_the_first_graph_is_used_again(way):
    """The whole model in one graph (``fullgraph=True``) with the capture as without."""
    unet = small_unet()
    with capture(unet) as eager:
        call(unet)
    model = compiled(unet, way)
    plain, first = call(model), graphs()
    with capture(model) as record:
        captured, second = call(model), graphs()
    assert torch.equal(plain, captured)
    assert second > first
    alike(record, eager)
    assert torch.equal(plain, call(model))
    with capture(model, f"{BLOCK}.attn1", reduce=("entropy",)) as statistics:
        assert torch.equal(plain, call(model))
    assert [entry.layer for entry in statistics] == [f"{BLOCK}.attn1"]
    assert graphs() == second  # neither without a capture, nor for another choice of layers
    assert not counters["graph_break"]


def test_processors_hooks_and_state_are_as_before():
    model = compiled(small_unet(), "compile_repeated_blocks")
    layers = attention_layers(model)
    before = {name: id(layer.processor) for name, layer in layers.items()}
    keys = list(model.state_dict())
    with capture(model, f"{BLOCK}.*") as record:
        assert all(id(layer.processor) != before[name] for name, layer in layers.items())
        assert list(model.state_dict()) == keys
        call(model)
    assert {name: id(layer.processor) for name, layer in layers.items()} == before
    assert not model._forward_hooks and not model._forward_pre_hooks
    seen = [weakref.ref(entry.query) for entry in record]
    del record
    gc.collect()
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("make", [None, ModuleProcessor], ids=["stock", "module"])
def test_copy_of_a_captured_model_is_not_captured(make):
    unet = small_unet()
    if make is not None:
        set_processors(unet, make)
    kinds = {name: type(layer.processor) for name, layer in attention_layers(unet).items()}
    with capture(compiled(unet, "compile_repeated_blocks")) as record:
        copied = copy.deepcopy(unet)
        call(copied)
    assert not len(record)
    assert {n: type(layer.processor) for n, layer in attention_layers(copied).items()} == kinds


def test_layers_that_are_not_compiled_are_captured_beside_those_that_are():
    unet = small_unet()
    with capture(unet) as eager:
        call(unet)
    block = unet.get_submodule(BLOCK)
    block.attn1 = torch.compile(block.attn1, backend="eager", fullgraph=True)
    with capture(unet) as record:
        call(unet)
    alike(record, eager)


def test_captures_nest_and_errors_leave_nothing_behind():
    model = compiled(small_unet(), "compile_repeated_blocks")
    before = {name: id(layer.processor) for name, layer in attention_layers(model).items()}

    def fail(_: Any) -> Any:
        raise KeyError("of the user's own")

    with capture(model, "*.attn1") as outer:
        with pytest.raises(KeyError), capture(model, "*.attn1", reduce=fail):
            call(model)
        with capture(model, "*.attn2") as inner:
            call(model)
    assert {name: id(layer.processor) for name, layer in attention_layers(model).items()} == before
    assert [entry.kind for entry in inner] == ["cross"] * 4
    assert [entry.kind for entry in outer if entry.step == outer[-1].step] == ["self"] * 4


@pytest.mark.parametrize(
    "make",
    [pytest.param(GainProcessor, marks=pytest.mark.slow), ModuleProcessor],
    ids=lambda make: make.__name__,
)
def test_processors_of_ones_own(make):
    """Those that are modules too, which Dynamo looks for among submodules only."""
    unet = small_unet()
    set_processors(unet, make)
    with capture(unet) as eager:
        call(unet)
    keys = list(unet.state_dict())
    model = compiled(unet, "compile_repeated_blocks")
    plain = call(model)
    with capture(model) as record:
        assert list(unet.state_dict()) == keys
        assert torch.equal(plain, call(model))
    alike(record, eager)
    assert list(unet.state_dict()) == keys
    assert all(type(layer.processor) is make for layer in attention_layers(unet).values())


@pytest.mark.slow
def test_training_records_forward_only():
    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        call(model).sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    unet = small_unet().requires_grad_(True).train()
    unet.enable_gradient_checkpointing()  # around the compiled blocks
    model = compiled(unet, "compile_repeated_blocks", "aot_eager")
    plain = gradients()
    with capture(model) as record:
        captured = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert len(record) == 8 and not any(entry.query.requires_grad for entry in record)


def test_operator_is_what_it_says():
    """Its schema, its fake, and that Dynamo and the functionalisation take it."""
    order, layer = torch.zeros(1, dtype=torch.int64), torch.tensor([-1])
    q = torch.randn(1, 2, 3, 4)
    torch.library.opcheck(
        _observe, (order, layer, q, q, None, None, False, False, 0, True, False, [])
    )


# -- every family, as users compile it -------------------------------------------------------------


def _run_compiled(name: str, way: str, folder: Any, prepare: Any = None, **more: Any) -> None:
    family = FAMILY[name]
    pipe = family.build(folder)
    model = getattr(pipe, family.denoiser)
    if prepare is not None:
        prepare(model)
    if prepare is add_ip_adapter:
        more |= image_prompts(model)
    with capture(pipe) as eager:
        family.run(pipe, **more)
    setattr(pipe, family.denoiser, compiled(model, way, "inductor"))
    plain = family.run(pipe, **more)
    with capture(pipe) as record:
        captured = family.run(pipe, **more)
    first = graphs()
    assert torch.equal(plain, captured)
    assert torch.equal(plain, family.run(pipe, **more))
    assert graphs() == first
    alike(record, eager, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_compiled_with_inductor(family, tmp_path):
    """Two steps with guidance, to the last bit: what the default backend makes of q and k too."""
    way = "compile_repeated_blocks"
    if not getattr(family.build(tmp_path).components[family.denoiser], "_repeated_blocks", None):
        way = "torch.compile"
    _run_compiled(family.name, way, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("way", WAYS[:2])
def test_whole_transformers_compiled_with_inductor(name, way, tmp_path):
    _run_compiled(name, way, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare",
    [add_lora, add_ip_adapter, lambda model: model.fuse_qkv_projections()],
    ids=["lora", "ip-adapter", "fused"],
)
def test_adapters_compiled_with_inductor(prepare, tmp_path):
    _run_compiled("sd15", "compile_repeated_blocks", tmp_path, prepare)


def test_layers_that_never_ran_are_warned_of():
    """As compiled code that did not take notice of the capture would look like."""

    class Skips(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = small_unet().get_submodule(BLOCK)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    with pytest.warns(UserWarning, match="the model ran, but none of the chosen layers did"):
        model = Skips()
        with capture(model):
            model(torch.zeros(1, 4, 16))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_cuda_graphs_are_refused_with_the_mode_to_take(way):
    unet = small_unet()
    if way == "torch.compile":
        model = torch.compile(unet, mode="reduce-overhead")
    else:
        getattr(unet, way)(mode="max-autotune")
        model = unet
    with pytest.raises(RuntimeError, match=r"CUDA graphs.*mode='default'.*-no-cudagraphs"):
        capture(model)


def test_processors_without_sdpa_are_refused_when_they_run():
    unet = small_unet()
    set_processors(unet, MatmulProcessor)
    model = compiled(unet, "compile_repeated_blocks")
    with pytest.raises(RuntimeError, match=rf"{BLOCK}.attn1' uses MatmulProcessor.*did not call"):
        with capture(model, f"{BLOCK}.attn1"):
            call(model)


def test_attention_that_falls_out_of_the_graph_is_refused():
    """It would be recorded, but nobody could say that the picture has the bits it had."""

    class Breaks(GainProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            torch._dynamo.graph_break()
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    unet = small_unet()
    set_processors(unet, Breaks)
    model = compiled(unet, "compile_repeated_blocks", fullgraph=False)
    with pytest.raises(
        RuntimeError, match=r"is not run by compiled code: .*`fullgraph=True` tells"
    ):
        with capture(model):
            call(model)
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(RuntimeError, match="is not run by compiled code"), capture(model):
            call(model)


def test_checkpointing_inside_the_graph_is_refused():
    unet = small_unet().requires_grad_(True).train()
    unet.enable_gradient_checkpointing()
    model = compiled(unet, "compile")
    with pytest.raises(RuntimeError, match=r"checkpointing.*compile_repeated_blocks"):
        with capture(model):
            call(model)


def test_functions_as_processors_are_refused():
    unet = small_unet()
    find_layers(unet, "*")[f"{BLOCK}.attn1"].processor = lambda attn, hidden_states, **_: None
    with pytest.raises(RuntimeError, match="no instance of an ordinary class"):
        with fm.capture(compiled(unet, "compile_repeated_blocks")):
            pass
    assert not unet._forward_hooks and not unet._forward_pre_hooks


def test_compiling_within_a_capture_is_refused_for_a_second_one():
    unet = small_unet()
    with capture(unet):
        unet.compile(backend="eager")
        with pytest.raises(RuntimeError, match="since before the model was compiled"):
            with capture(unet):
                pass
