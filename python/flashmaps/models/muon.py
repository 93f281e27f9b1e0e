"""Muon: steps along the orthogonal factor of the momentum, for weights that are matrices.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the steps are scaled
to the size of AdamW's as Liu et al., "Muon is scalable for LLM training" (2025), propose, so that
one learning rate serves both. torch's own takes matrices alone; a UNet's weights are mostly
convolutions, which are matrices of output channels by all else here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_SIZE = 0.2  # root mean square of an update of AdamW's, times the learning rate
# The quintic whose iterations bring all singular values near 1.
_A, _B, _C, _ROUNDS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and convolutions, AdamW for all other weights.

    Args:
        named: names and weights. Muon's are those of two or more dimensions, but for embeddings,
            the first and the last convolution.
        lr: of both.
        betas: of AdamW.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        outer = ("embed", "conv_in", "conv_out")
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, weight in named:
            inner = weight.ndim >= 2 and not any(word in name for word in outer)
            (hidden if inner else rest).append(weight)
        super().__init__([{"params": hidden}], {"lr": lr, "weight_decay": weight_decay})
        self.rest = torch.optim.AdamW(
            rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        (group,) = self.param_groups
        lr = group["lr"]
        self.rest.param_groups[0]["lr"] = lr
        self.rest.step()
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
        for shape, weights in alike.items():
            for start in range(0, len(weights), 8):  # a few at once: less memory
                self._along(weights[start : start + 8], shape, lr, group["weight_decay"])

    def _along(
        self, weights: list[Tensor], shape: tuple[int, int], lr: float | Tensor, decay: float
    ) -> None:
        momenta: list[Tensor] = []
        gradients: list[Tensor] = []
        for weight in weights:
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            momenta.append(state["momentum"])
            gradients.append(weight.grad)  # type: ignore[arg-type]
        torch._foreach_mul_(momenta, _MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=_MOMENTUM)
        updates = orthogonal(torch.stack([each.view(shape) for each in ahead]))
        updates = updates * (lr * _SIZE * max(shape) ** 0.5)
        torch._foreach_mul_(weights, 1 - lr * decay)
        along = [update.view_as(weight) for update, weight in zip(updates, weights, strict=True)]
        torch._foreach_sub_(weights, along)

    def make_replayable(self) -> None:
        """For CUDA graphs: the rate becomes a tensor, and all that it keeps is made now."""
        (group,) = self.param_groups
        for weight in group["params"]:
            self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        make_replayable(self.rest)
        group["lr"] = self.rest.param_groups[0]["lr"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all weights."""
        super().zero_grad(set_to_none)
        self.rest.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers'."""
        return {"muon": super().state_dict(), "adamw": self.rest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite."""
        super().load_state_dict(state["muon"])
        self.rest.load_state_dict(state["adamw"])


def make_replayable(optimizer: torch.optim.AdamW) -> None:
    """The same for a fused AdamW."""
    (group,) = optimizer.param_groups
    device = group["params"][0].device
    group["lr"], group["capturable"] = torch.tensor(float(group["lr"]), device=device), True
    for weight in group["params"]:
        state = optimizer.state[weight]
        state.setdefault("step", torch.zeros((), device=device))
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(weight))


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each matrix's U S V^T, but for singular values of 0.7 to 1.2: [b, m, n] float32."""
    x = matrices.bfloat16()
    upright = x.shape[-2] > x.shape[-1]
    x = x.mT if upright else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if upright else x).float()
