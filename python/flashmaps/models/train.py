"""Train the built-in miniature: first the VAE, then UNet and text encoder on its latents.

    python -m flashmaps.models.train --out DIR --work DIR [--preset h100] [--resume]

DIR of --work keeps the drawn pictures, checkpoints, sample sheets and the log of losses
(log/log.jsonl). With --resume a call goes on from there; without it all but the pictures begins
anew, and what somebody else has put in its place is a refusal. The same command runs on CPU and
GPU. A preset is a set of defaults: "cpu" for hours on a few cores, "h100" for 25 minutes on one
large GPU.

On a CPU a picture of 64 pixels costs a quarter of one of 128, and much of what is learnt from it
holds at 128:

    python -m flashmaps.models.train --out SMALL --work SMALLER --size 64 --unet-batch 32
    python -m flashmaps.models.train --out DIR --work OTHER --init SMALL

docs/training.md says what is learnt from what, and how the packaged weights are trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from flashmaps.files import adopt, check_folder, discard, whole_folder

from .architecture import TINY, Parts, Sizes, build
from .bank import open_bank
from .card import model_card, trainings
from .export import (
    HISTORY,
    KIND,
    LINES,
    LOG,
    LOGS,
    as_pipeline,
    export,
    read_log,
    read_trainings,
)
from .loop import Paused
from .pictures import FIRST, Pictures
from .sheet import CAPTIONS, write_sheet
from .store import Stream
from .unet import train_unet
from .vae import train_vae

PARTS = ["vae", "unet", "text_encoder"]
# What a training writes into --work and a new one begins anew, by its kind.
_WORK = {
    "vae": "checkpoint",
    "vae-done": "vae",
    "unet": "checkpoint",
    "latents": "latents",
    LOGS: "log",
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "bank": 12_288, "stream": 0, "workers": 2, "compile": False, "graphs": False, "warmup": 200,
        "vae_steps": 4000, "vae_batch": 16, "vae_crop": 64, "vae_lr": 1e-3, "vae_ema": 0.998,
        "unet_steps": 100_000, "unet_batch": 16, "unet_lr": 5e-4, "unet_ema": 0.999,
        "views": 0.375, "agreement": 0.2, "walks": 0.2, "mutual": 0.3125, "alignment": 0.0,
        "log_every": 10, "save_every": 100, "samples_every": 1000,
    },
    "h100": {  # ran on one but for the VAE and --compile: those are not measured on hardware
        "bank": 6144, "stream": 140_000, "workers": 15, "compile": False, "graphs": True,
        "warmup": 100,
        "vae_steps": 1_000_000, "vae_batch": 64, "vae_crop": 128, "vae_lr": 1e-3, "vae_ema": 0.999,
        "vae_minutes": 5.0,
        "unet_steps": 1_000_000, "unet_batch": 256, "unet_lr": 1.5e-3, "unet_ema": 0.998,
        "unet_optimizer": "muon",
        "views": 0.7, "agreement": 0.6, "walks": 0.0, "mutual": 0.0625, "alignment": 0.0,
        "unet_minutes": 14.0,
        "log_every": 25, "save_every": 1000, "samples_every": 4000,
    },
    "tiny": {
        "bank": 8, "stream": 0, "workers": 0, "compile": False, "graphs": False, "warmup": 2,
        "vae_steps": 4, "vae_batch": 2, "vae_crop": 16, "vae_lr": 1e-3, "vae_ema": 0.99,
        "unet_steps": 4, "unet_batch": 8, "unet_lr": 1e-3, "unet_ema": 0.99,
        "views": 0.375, "agreement": 0.2, "walks": 0.2, "mutual": 0.25, "alignment": 0.0,
        "log_every": 1, "save_every": 2, "samples_every": 1000,
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train both stages and export the pipeline; `argv` as on the command line."""
    started = time.monotonic()
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if args.resume and (args.out / HISTORY).is_file():
        adopt(args.out, KIND)  # one that was written before folders had markers
    check_folder(args.out, KIND)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, kind in _WORK.items():
        check_folder(args.work / name, kind)
        if not args.resume:
            discard(args.work / name)
    if not (args.work / LOGS).is_dir():
        with whole_folder(args.work / LOGS, _WORK[LOGS]) as new:
            for name in (LINES, LOG):
                (new / name).touch()
    _log_run(args)
    try:
        train(args, started + 60 * args.pause_after)
    except Paused as pause:
        print(f"paused at {pause}; the same command with --resume goes on")


def train(args: argparse.Namespace, deadline: float) -> None:
    """Both stages, from wherever they are, and the export."""
    tiny = args.preset == "tiny"
    sizes = TINY if tiny else Sizes(image=args.size)
    parts = build(sizes, args.seed, args.prediction)
    if args.init is not None:
        _start_from(parts, args.init, args.init_parts)
    bank = open_bank(
        args.work / "bank",
        Pictures(
            size=sizes.image,
            count=args.bank,
            seed=args.seed,
            alone=args.alone,
            kin=args.kin,
            labelled=args.alignment > 0,
        ),
        args.workers,
    )
    count = 4 if tiny else 128
    checks = {
        kind: open_bank(
            args.work / f"held-out-{kind}",
            Pictures("validation", size=sizes.image, count=count, seed=args.seed + 1, photos=share),
            args.workers,
        )
        for kind, share in (("world", 0.0), ("photos", 1.0))
    }
    held_out = {kind: torch.from_numpy(check.images[:, FIRST]) for kind, check in checks.items()}
    stream = None
    if args.stream:
        if args.alignment > 0:
            raise ValueError("--stream draws no labels, which --alignment needs; leave one out")
        drawn = Pictures(
            size=sizes.image,
            count=args.bank + args.stream,
            seed=args.seed,
            alone=args.alone,
            kin=args.kin,
        )
        stream = Stream(drawn, args.bank, args.workers, parts.tokenizer)
    parts.vae = train_vae(parts.vae, bank, held_out, args, deadline)
    pipe = as_pipeline(parts)
    options: dict[str, Any] = (
        {"captions": CAPTIONS[:2], "steps": 2} if args.preset == "tiny" else {}
    )

    def publish(name: str) -> None:
        # Before the first line of this training's log come those of the weights it started from.
        log = read_log(args.work / LOGS) + (args.work / LOGS / LINES).read_text()
        card = model_card(parts, args.work, args)
        export(parts, args.out, card, trainings(args.work, args), log)
        (args.work / "samples").mkdir(exist_ok=True)
        write_sheet(pipe, args.work / "samples" / f"{name}.jpg", **options)

    loop = train_unet(parts, bank, checks["world"], args, deadline, publish, stream)
    with loop.averaged():
        publish("last")


def _start_from(parts: Parts, folder: Path, names: list[str]) -> None:
    """Take the weights of an exported pipeline of the same sizes and vocabulary."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True
    )
    for name in names:
        try:
            getattr(parts, name).load_state_dict(getattr(pipe, name).state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--init {folder}: its {name} does not fit the one that is trained ({reason}); "
                "name those that do with --init-parts"
            ) from None


def _log_run(args: argparse.Namespace) -> None:
    """The log's line for this call: what runs it, for the model card."""
    on_gpu = torch.cuda.is_available() and not args.cpu
    hardware = torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"
    line: dict[str, Any] = {
        "stage": "run",
        "hardware": hardware,
        "torch": torch.__version__,
        "seed": args.seed,
    }
    if args.init is not None:
        line["init"] = ", ".join(args.init_parts)
        if "unet" in args.init_parts:
            line["earlier"] = read_trainings(args.init)
            (args.work / LOGS / LOG).write_text(read_log(args.init))
    with open(args.work / LOGS / LINES, "a") as log:
        log.write(json.dumps(line) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(
        prog="python -m flashmaps.models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="pipeline folder, written with each sample sheet")
    add("--work", type=Path, help="pictures, checkpoints and log (default: OUT-work)")
    add("--name", default="builtin", help="of the model, in its card")
    add("--resume", action="store_true", help="go on from the checkpoints in --work")
    add("--preset", choices=PRESETS, default="cpu")
    add(
        "--pause-after", type=float, default=math.inf, help="minutes; then end this call, resumable"
    )
    add("--init", type=Path, help="pipeline folder whose weights to start from")
    add("--init-parts", nargs="+", choices=PARTS, default=PARTS, help="which of its weights")
    for stage in ("vae", "unet"):
        add(f"--{stage}-steps", type=int, help="the stage ends after so many")
        add(f"--{stage}-minutes", type=float, default=math.inf, help="or after so long")
        add(f"--{stage}-batch", type=int)
        add(f"--{stage}-lr", type=float)
        add(f"--{stage}-ema", type=float, help="decay of the averaged weights")
    add("--unet-optimizer", choices=("adamw", "muon"), default="adamw")
    add("--vae-crop", type=int, help="pixels a side that the VAE is shown; a multiple of 16")
    add("--views", type=float, help="share of a batch in three views that have to agree")
    add("--agreement", type=float, help="weight of views' losses on features and attention")
    add("--shift", type=float, default=0.4, help="largest shift of pictures in views, in sides")
    add("--walks", type=float, help="weight of the loss on walks to the same object and back")
    add(
        "--kin",
        type=float,
        default=0.0,
        help="share of walks and pairs that meet another object of the category",
    )
    add("--mutual", type=float, help="share of a batch in pairs that see each other")
    add("--alignment", type=float, help="weight of the loss of flashmaps.models.alignment; 0: none")
    add("--warmup", type=int, help="steps in which the learning rate rises")
    add("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    add(
        "--size",
        type=int,
        default=Sizes().image,
        help="pixels a side; first small, then --init from there at full size, learns faster",
    )
    add("--bank", type=int, help="examples of three pictures that are drawn before training")
    add(
        "--stream",
        type=int,
        help="further examples, drawn by --workers while the UNet trains; which of them a step "
        "finds is a matter of time, so such a training does not repeat to the bit",
    )
    add(
        "--alone",
        type=float,
        default=0.5,
        help="share of scenes with one object alone; first many, then --init from there with fewer",
    )
    add("--workers", type=int, help="processes that draw them")
    add("--log-every", type=int, help="steps")
    add("--save-every", type=int, help="steps between checkpoints")
    add(
        "--samples-every", type=int, help="steps between sample sheets, held-out losses and exports"
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile")
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, run the UNet's losses and gradients as CUDA graphs",
    )
    add("--precision", choices=("bf16", "no"), default="bf16", help="of autocast")
    add("--cpu", action="store_true", help="also where there is a GPU")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[chosen.preset])
    args = parser.parse_args(argv)
    if args.stream < 0:
        parser.error(f"--stream counts examples, so it cannot be {args.stream}")
    if args.work is None:
        args.work = args.out.with_name(args.out.name + "-work")
    return args


if __name__ == "__main__":
    main()
