"""The training loop that both stages share: limits, learning rate, average, checkpoints, log."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from flashmaps.files import adopt, check_folder, whole_folder

from .export import LINES, LOGS
from .muon import Muon, make_replayable

Loss = Callable[[int], tuple[Tensor, dict[str, Tensor]]]

_COOLING = 0.3  # last share of a stage, in which the learning rate falls
_FLOOR = 0.02  # of the learning rate, at the very end


class Paused(Exception):
    """The call's own time limit came before the end of the stage; a checkpoint was written."""


class Loop:
    """One stage: minimises a loss over some modules and keeps their exponential moving average.

    All chance is drawn from (seed, stage, step), so that a resumed run sees what an uninterrupted
    one would have seen, to the bit on the same device. A stage ends after ``steps`` steps or
    ``minutes`` minutes of its own, whichever comes first; the learning rate is constant after a
    warm-up and falls along a cosine in the last part, by whichever limit is nearer. So where a
    stage is ended by the clock, a rerun is alike but not the same to the bit.

    Args:
        name: of the stage.
        modules: what is trained; their names are those of the pipeline's parts.
        args: the command line, with ``{name}_steps``, ``_minutes``, ``_batch``, ``_lr``, ``_ema``.
        deadline: `time.monotonic()` at which the call pauses.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        args: argparse.Namespace,
        deadline: float,
        weight_decay: float = 0.0,
    ) -> None:
        options = vars(args)
        self.name, self.args, self.modules = name, args, modules
        self.steps, self.minutes = options[f"{name}_steps"], options[f"{name}_minutes"]
        self.batch, self.lr = options[f"{name}_batch"], options[f"{name}_lr"]
        self.deadline = deadline
        # One for each stage: what is registered with it makes up the stage's checkpoints.
        self.accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu)
        self.device = self.accelerator.device
        self.folder: Path = args.work / name
        self.log: Path = args.work / LOGS / LINES
        for module in modules.values():
            module.to(self.device).train().requires_grad_(True)
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        chosen: dict[str, Any] = {
            "lr": self.lr,
            "betas": (0.9, 0.99),
            "weight_decay": weight_decay,
        }
        self.optimizer: torch.optim.Optimizer
        if options.get(f"{name}_optimizer", "adamw") == "muon":
            named = [
                (f"{part}.{place}", weight)
                for part, module in modules.items()
                for place, weight in module.named_parameters()
            ]
            self.optimizer = Muon(named, **chosen)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **chosen)
        self.average = EMAModel(
            self.parameters, decay=options[f"{name}_ema"], use_ema_warmup=True, power=0.75,
            foreach=True,
        )  # fmt: skip
        self.average.to(self.device)
        self.step, self.samples, self.elapsed = 0, 0, 0.0
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._saved = -1
        self._replayed = False
        self.accelerator.register_for_checkpointing(
            *modules.values(), self.optimizer, self.average, self
        )
        if args.resume and self.folder.is_dir():
            self.accelerator.load_state(str(self.folder))
            adopt(self.folder, "checkpoint")  # one that was written before folders had markers
            self.average.to(self.device)
            self._saved = self.step
        check_folder(self.folder, "checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """What the loop itself has to remember, for `Accelerator.save_state`."""
        return {"step": self.step, "samples": self.samples, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite."""
        self.step, self.samples = state["step"], state["samples"]
        self.elapsed = state["elapsed"]

    def progress(self) -> float:
        """Share of the stage that is done, by steps or by clock, whichever is further."""
        return max(self.step / max(self.steps, 1), self.elapsed / (60 * self.minutes))

    def generator(self, purpose: int = 0) -> torch.Generator:
        """The noise of this step, the same whether the run was interrupted or not."""
        return torch.Generator(self.device).manual_seed(self._seed(purpose))

    def chance(self, purpose: int) -> float:
        """A number of [0, 1) of this step, known on the host."""
        return random.Random(self._seed(purpose)).random()

    def _seed(self, purpose: int) -> int:
        stage = sum(self.name.encode())
        return ((self.args.seed * 1009 + stage) * 8 + purpose) * 100_000_000 + self.step

    def run(self, loss: Loss, samples: Callable[[], dict[str, float]]) -> None:
        """Minimise ``loss(step) -> (loss, more to log)``; now and then log what ``samples`` finds.

        Raises Paused at the deadline, RuntimeError when the loss is no longer a number.
        """
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < self.steps and self.elapsed < 60 * self.minutes:
            if time.monotonic() > self.deadline:
                self._log()
                self.save()
                raise Paused(f"{self.name}, step {self.step}")
            start = time.monotonic()
            self._descend(loss)
            self.elapsed += time.monotonic() - start
            bar.update()
            if self.step % self.args.log_every == 0:
                bar.set_postfix(loss=f"{self._log()['loss']:.4f}", refresh=False)
            if self.step % self.args.save_every == 0:
                self.save()
            if self.step % self.args.samples_every == 0:
                start = time.monotonic()
                self._write(**self._averaged(samples))
                self.elapsed += time.monotonic() - start
        bar.close()
        self._log()
        self.save()

    def make_replayable(self) -> None:
        """From now on `descend` is called by what replays the loss (replay.py), not by the loop."""
        self._replayed = True
        if isinstance(self.optimizer, Muon):
            self.optimizer.make_replayable()
        else:
            make_replayable(self.optimizer)  # type: ignore[arg-type]

    def descend(self) -> None:
        """The optimizer's step along the gradients, which are clipped."""
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def rehearse(self) -> None:
        """`descend` at a rate of zero: no weight is moved."""
        (rate,) = {group["lr"] for group in self.optimizer.param_groups}
        kept = rate.clone()
        rate.zero_()
        self.descend()
        rate.copy_(kept)

    def _descend(self, loss: Loss) -> None:
        rate = self.lr * self._rate()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with self.accelerator.autocast():
            value, numbers = loss(self.step)
        if value.requires_grad:  # else the loss has left the gradients already (replay.py)
            self.accelerator.backward(value)
        if not self._replayed:
            self.descend()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.step(self.parameters)
        self.step += 1
        self.samples += self.batch
        # Summed where they are: reading a number would wait for the GPU.
        for key, number in {"loss": value.detach(), **numbers}.items():
            self._sums[key] = self._sums.get(key, 0.0) + number
        self._summed += 1

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.args.warmup)
        cooled = max(0.0, min(1.0, (self.progress() - 1 + _COOLING) / _COOLING))
        return warm * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * cooled)))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averaged weights in the modules, ready to be used."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        for module in self.modules.values():
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.average.restore(self.parameters)
            for module in self.modules.values():
                module.train()

    def _averaged(self, function: Callable[[], dict[str, float]]) -> dict[str, float]:
        with self.averaged():
            return function()

    def save(self) -> None:
        """A checkpoint: modules, optimizer, average, step, whole or not at all."""
        if self._saved == self.step:
            return
        self._saved = self.step
        with whole_folder(self.folder, "checkpoint") as new:
            self.accelerator.save_state(str(new))

    def _log(self) -> dict[str, float]:
        if not self._summed:
            return {"loss": math.nan}
        means = {key: float(total) / self._summed for key, total in self._sums.items()}
        self._sums, self._summed = {}, 0
        if not math.isfinite(means["loss"]):
            raise RuntimeError(
                f"{self.name}: the loss is {means['loss']} at step {self.step}; go on from the "
                f"last checkpoint with --resume and a lower --{self.name}-lr"
            )
        self._write(**means, lr=float(self.optimizer.param_groups[0]["lr"]))
        return means

    def _write(self, **numbers: float) -> None:
        line = {
            "stage": self.name,
            "step": self.step,
            "samples": self.samples,
            "seconds": round(self.elapsed, 2),
            **numbers,
        }
        with open(self.log, "a") as log:
            log.write(json.dumps(line) + "\n")
