"""Embeddings while they are trained: Adam, their running mean, and the file to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.files import whole_file

STATE = "state.safetensors"


class Training:
    """Embeddings of any shape, Adam's moments, the losses so far.

    Args:
        start: what they begin as; its device is theirs.
        rate: of Adam.
        ema: of the running mean, which is (1 + step) / (10 + step) at most; 0: none is kept.

    Attributes:
        embedding: the leaf that is trained. average: the running mean, or the leaf's values.
        best: an average that was kept.
        notes: numbers that go with the state, as JSON has them.
    """

    def __init__(self, start: Tensor, rate: float, ema: float = 0.0) -> None:
        self.embedding = start.detach().clone().requires_grad_()
        self.rate, self.ema = rate, ema
        self.adam = torch.optim.Adam([self.embedding], lr=rate)
        self.average = self.embedding.detach().clone()
        self.best = self.average  # whatever its keeper takes for it
        self.losses: list[float] = []
        self.notes: dict[str, Any] = {}

    def step(self, loss: Tensor, scale: float = 1.0) -> None:
        """One step down the loss; ``scale``: of the rate in this step.

        Raises ValueError where the loss is not finite.
        """
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {float(loss.detach())} in step {len(self.losses)}: a smaller rate, "
                "or a model in higher precision"
            )
        (slope,) = torch.autograd.grad(loss, self.embedding)
        self.embedding.grad = slope
        (group,) = self.adam.param_groups
        group["lr"] = self.rate * scale
        self.adam.step()
        done = len(self.losses)
        self.losses.append(float(loss.detach()))
        keep = min(self.ema, (1 + done) / (10 + done))
        self.average = self.average * keep + self.embedding.detach() * (1 - keep)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write the state with the settings that it depends on, whole or not at all."""
        with whole_file(path) as new:
            self.write(new, settings)

    def write(self, path: Path, settings: dict[str, Any]) -> None:
        """Write the state to a path that is safe to write to."""
        from safetensors.torch import save_file

        moments = self.adam.state[self.embedding]
        tensors = {
            "embedding": self.embedding.detach().cpu(),
            "mean": moments["exp_avg"].cpu(),
            "square": moments["exp_avg_sq"].cpu(),
            "average": self.average.cpu(),
            "best": self.best.cpu().clone(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        about = {"settings": json.dumps(settings), "notes": json.dumps(self.notes)}
        save_file(tensors, path, metadata=about)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from a state. ValueError where it is of other settings, saying which."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        before, now = json.loads(about["settings"]), json.loads(json.dumps(settings))
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            raise ValueError(
                f"{str(path)!r} was begun with {other[0]}={before.get(other[0])!r}, not "
                f"{now[other[0]]!r}: give the same arguments to go on, or another folder"
            )
        self.losses = tensors["losses"].tolist()
        self.notes = json.loads(about.get("notes", "{}"))
        here = self.embedding.device
        with torch.no_grad():
            self.embedding.copy_(tensors["embedding"])
        self.average = tensors.get("average", tensors["embedding"]).to(here)
        self.best = tensors.get("best", tensors["embedding"]).to(here)
        self.adam.state[self.embedding] = {
            "step": torch.tensor(float(len(self.losses))),
            "exp_avg": tensors["mean"].to(here),
            "exp_avg_sq": tensors["square"].to(here),
        }
