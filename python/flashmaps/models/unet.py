"""Stage two: UNet and text encoder, fitted to undo noise in the latents of captioned pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from torch import Tensor

from flashmaps.files import whole_folder

from . import alignment
from .agreement import Reader, disagreement
from .alignment import Alignment
from .architecture import Parts
from .bank import Bank, encode, tokenize
from .batch import BLIND, STEPS, Rows, draw
from .loop import Loop
from .mutual import Mutual, share_attention
from .pictures import FIRST, SECOND, VIEW
from .replay import Replayed
from .store import Store, Stream, add_drawn
from .views import moved, warped

SNR_GAMMA = 5.0  # steps with less noise than that count less: nearly all they ask for is noise
LOSS_WEIGHT = f"min(1, {SNR_GAMMA:g} / SNR)"
# The decoder's blocks that views have to agree in: at half the latents' side, and at the full one.
AGREEING = (
    "up_blocks.1.attentions.1.transformer_blocks.0",
    "up_blocks.2.attentions.0.transformer_blocks.0",
)
_HELD_OUT = 99  # a purpose for generators that no step uses
# Those of views' shifts and warps, of who sees whom, and of the rows that are looked at.
_MOVES, _WARPS, _SIGHT, _ASKED = 7, 6, 5, 4


def train_unet(
    parts: Parts,
    bank: Bank,
    held_out: Bank,
    args: argparse.Namespace,
    deadline: float,
    publish: Callable[[str], None],
    stream: Stream | None = None,
) -> Loop:
    """Fit UNet and text encoder; returns the loop, which has their averages.

    The loss is the squared error of what is predicted times min(1, 5 / SNR). For noise that is
    min-SNR weighting. For velocity, the default, it is Stable Diffusion 2's own loss but for the
    nearly noiseless steps; min-SNR proper would divide it by SNR + 1 as well, which leaves a
    hundredth of the weight at t = 900 and a quarter at t = 500, where a picture takes shape.

    A batch has three kinds of pictures. Plain ones have a caption and any noise. With
    ``args.mutual`` so large a share of them are pairs of pictures of one object, a noisier and a
    cleaner one, which see each other in the decoder's self-attention
    (:mod:`flashmaps.models.mutual`). With ``args.agreement`` or ``args.walks`` above 0 the share
    ``args.views`` is shown in three views, without captions and with little noise, and so much of
    the losses of :mod:`flashmaps.models.agreement` is added; the recoloured views are not for
    denoising. No label takes part in any of this.

    With ``args.alignment`` above 0, so much of the loss of :mod:`flashmaps.models.alignment` is
    added on the plain pictures, each weighted by the share of the signal in it (alpha_bar): that is
    supervision.
    ``publish`` is called now and then, with the averages in the modules and the step as a name.
    """
    modules: dict[str, Any] = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    blocks = {name: parts.unet.get_submodule(name) for name in alignment.LAYERS}
    supervisor = Alignment([block.norm1.normalized_shape[0] for block in blocks.values()])
    told_of: dict[str, Tensor] = {}
    if args.alignment > 0:
        if bank.labels is None:
            raise ValueError("the alignment loss needs a bank that was drawn with labels")
        modules["alignment"] = supervisor
        for name, block in blocks.items():
            block.register_forward_hook(partial(_keep, told_of, name))
    loop = Loop("unet", modules, args, deadline, weight_decay=1e-2)
    device, scheduler = loop.device, parts.scheduler
    if device.type == "cpu":
        _use_plain_attention(parts)
    agreeing = args.agreement > 0 or args.walks > 0
    rows = Rows.of(
        loop.batch,
        views=args.views if agreeing else 0.0,
        mutual=args.mutual,
        kinds=3 if args.walks > 0 else 2,
    )
    mutual = Mutual()
    if rows.pairs:
        share_attention(parts.unet, mutual)
    reader = Reader(parts.unet, AGREEING) if agreeing else None
    store = _store(parts, bank, args, device)
    labels = store.labels
    parts.vae.to(device)
    if stream is not None:
        store = store.with_room(stream.count)
        stream.start(device)
    cells = store.latents.shape[-1]
    encoded = partial(encode, parts.vae, chunk=16 if device.type == "cpu" else 1024)
    checked = encode(parts.vae, torch.from_numpy(held_out.images[:, FIRST]), 16)
    checked = checked.to(device)
    checked_tokens = held_out.tokens(parts.tokenizer)[:, FIRST, 0].to(device)
    empty = tokenize(parts.tokenizer, [""]).to(device)
    signal = compute_snr(scheduler, torch.arange(STEPS)).to(device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    weights = signal.clamp(max=SNR_GAMMA) / signal
    share = scheduler.alphas_cumprod.to(device)
    unet = torch.compile(parts.unet, dynamic=False) if args.compile else parts.unet

    def text(ids: Tensor) -> Tensor:
        if device.type != "cpu":  # `unique` would wait for the GPU
            every: Tensor = parts.text_encoder(ids)[0]
            return every
        texts, place = ids.unique(dim=0, return_inverse=True)  # many rows have no caption
        found: Tensor = parts.text_encoder(texts)[0][place]
        return found

    def error(model: Any, clean: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, t)
        wanted = scheduler.get_velocity(clean, noise, t) if velocity else noise
        found = model(noisy, t, text(ids)).sample.float()
        return weights[t] * (found - wanted).square().mean(dim=(1, 2, 3))

    def losses(
        blind: bool,
        clean: Tensor,
        ids: Tensor,
        t: Tensor,
        noise: Tensor,
        where: Tensor,
        asked: Tensor,
        told: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch, its views shifted already; ``told`` are labels of the less noisy half."""
        given = clean, ids, t, noise
        with mutual.among(0, rows.pairs, blind):
            total = error(unet, *(x[rows.denoised] for x in given)).mean()
        numbers = {"noise": total.detach()}
        plain = [told_of.pop(name)[-rows.plain :] for name in alignment.LAYERS if told_of]
        if reader is not None:
            clean, ids, t, noise = (x[rows.views] for x in given)
            seen = reader.look(parts.unet, scheduler.add_noise(clean, noise, t), t, text(ids))
            parted, found = disagreement(seen, where, asked)
            total = total + args.agreement * (parted["features"] + parted["attention"]) / 2
            if args.walks > 0:
                total = total + args.walks * parted["walks"]
            numbers |= {name: number.detach() for name, number in parted.items()}
            numbers["found"] = found
        if len(told):
            outputs = [output[: len(told)] for output in plain]
            aligned = supervisor(outputs, told, share[given[2][rows.plainly][: len(told)]])
            total = total + args.alignment * aligned
            numbers["aligned"] = aligned.detach()
        return total, numbers

    replayed = None
    if args.graphs and device.type == "cuda":

        def uncached(blind: Hashable, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast("cuda", torch.bfloat16, args.precision == "bf16", False):
                return losses(bool(blind), *inputs)

        loop.make_replayable()
        replayed = Replayed(uncached, loop.parameters, loop.descend, loop.rehearse)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if stream is not None:
            add_drawn(store, stream, encoded)
        there = [torch.empty(0, device=device)]

        def see(viewed: Tensor) -> Tensor:
            paint = store.paint[viewed.to(store.paint.device)].to(device)
            views, there[0] = warped(paint, cells, loop.generator(_WARPS))
            return encoded(views)

        shown = draw(rows, store, empty, loop.generator(), see, only_first=args.alignment > 0)
        clean, where, told = shown.clean, there[0], torch.empty(0, device=device)
        if rows.examples:
            views, where = moved(clean[rows.views], where, args.shift, loop.generator(_MOVES))
            clean = torch.cat([views, clean[rows.denoised]])
        if labels is not None and args.alignment > 0:  # t is in order; behind lies more noise
            told = labels[shown.example[rows.plainly][: max(1, rows.plain // 2)]]
        # No map of views has more rows than a quarter of the latents' cells.
        asked = torch.randperm(cells**2, generator=loop.generator(_ASKED), device=device)
        given = clean, shown.ids, shown.t, shown.noise, where, asked[: cells**2 // 4], told
        blind = loop.chance(_SIGHT) < BLIND
        total, numbers = losses(blind, *given) if replayed is None else replayed(blind, *given)
        if stream is not None:
            numbers = {**numbers, "drawn": torch.tensor(float(len(store)))}
        return total, numbers

    def samples() -> dict[str, float]:
        count = len(checked)
        fixed = torch.Generator(device).manual_seed(_HELD_OUT)
        noise = torch.randn(checked[:, 0].shape, generator=fixed, device=device)
        t = torch.arange(count, device=device) * STEPS // count
        with loop.accelerator.autocast():
            found = [
                error(parts.unet, checked[i, 0].float(), checked_tokens[i], t[i], noise[i])
                for i in torch.arange(count, device=device).split(32)
            ]
        publish(f"{loop.step:07d}")
        return {"held_out_loss": torch.cat(found).mean().item()}

    try:
        loop.run(loss, samples)
    finally:
        if stream is not None:
            stream.close()
    return loop


def _use_plain_attention(parts: Parts) -> None:
    """Matrix products and a softmax instead of torch's fused attention, for maps of up to 256^2.

    On CPU the fused one's backward takes eight times its forward: a step of 64 pictures of 64
    pixels took 1.08 s with it and 0.64 s so. From 1024 tokens on it is the faster one.
    """
    unet = parts.unet
    finest = "down_blocks.0.", f"up_blocks.{len(unet.config.up_block_types) - 1}."
    many = unet.config.sample_size > 16
    unet.set_attn_processor(
        {
            name: AttnProcessor2_0()
            if many and ".attn1." in name and name.startswith(finest)
            else AttnProcessor()
            for name in unet.attn_processors
        }
    )
    parts.text_encoder.set_attn_implementation("eager")


def _keep(seen: dict[str, Tensor], name: str, module: Any, _given: Any, output: Tensor) -> None:
    if module.training:
        seen[name] = output


def _store(parts: Parts, bank: Bank, args: argparse.Namespace, device: torch.device) -> Store:
    """The bank, its pictures through the frozen encoder, once: else they cost a part of each step.

    What views are made of stays as pixels, since each step warps it anew.
    """
    labels = None if bank.labels is None else torch.from_numpy(bank.labels).to(device)
    tokens = bank.tokens(parts.tokenizer).to(device)
    paint = torch.from_numpy(bank.images[:, VIEW])
    path = args.work / "latents" / "latents.pt"
    if args.resume and path.is_file():
        found = torch.load(path, map_location=device, mmap=device.type == "cpu")
        if found.shape[:2] == (len(bank), SECOND + 1):
            return Store(found, tokens, paint, labels)
    parts.vae.to(device)
    images = torch.from_numpy(bank.images[:, : SECOND + 1]).flatten(0, 1)
    found = encode(parts.vae, images, 16 if device.type == "cpu" else 256, "latents")
    found = found.unflatten(0, (len(bank), -1))
    with whole_folder(path.parent, "latents") as new:
        torch.save(found.cpu(), new / path.name)
    return Store(found, tokens, paint, labels)
