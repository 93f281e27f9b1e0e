"""Time and memory of a round trip, measured in a process of its own, beside eager torch.

The peak of a process is the peak of everything it ever did, so each way of computing gets a fresh
process which loads Q and K, notes its memory, computes, and reports how much higher its peak went.

    python -m flashmaps.app.costs eager features.safetensors
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashmaps.diffusion.features import Features
from flashmaps.maps.grids import Grid, centres
from flashmaps.maps.statistics import RoundTrip, round_trip

METHODS = ("flashmaps", "eager")
_REPEATS = 3


def measure(
    source: Features, target: Features, method: str, *, backend: str = "auto"
) -> dict[str, Any]:
    """Seconds and peak extra memory of one full round trip, in a fresh process.

    Args:
        method: "flashmaps" (with ``backend``) or "eager", plain torch that builds both maps.

    Returns seconds (median of 3, after a first call), peak_mb (10^6 bytes above what the process
    held with Q and K loaded, in the first call), threads, hard_ims, soft_ims and mean_ime.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.safetensors"
        tensors = {
            "query_s": source.query,
            "key_s": source.key,
            "query_t": target.query,
            "key_t": target.key,
            "head_weights": source.head_weights,
        }
        settings = {
            "scale": source.scale,
            "grid_s": source.grid,
            "grid_t": target.grid,
            "backend": backend,
            "threads": torch.get_num_threads(),
        }
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"settings": json.dumps(settings)},
        )
        here = str(Path(__file__).resolve().parents[2])
        old = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "PYTHONPATH": here + (os.pathsep + old if old else "")}
        done = subprocess.run(
            [sys.executable, "-m", "flashmaps.app.costs", method, str(path)],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {method} failed (exit code {done.returncode}): {last}")
    return json.loads(done.stdout.splitlines()[-1])


def eager_round_trip(
    query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor, head_weights: Tensor,
    scale: float, grid_s: Grid,
) -> dict[str, Tensor]:  # fmt: skip
    """The statistics of :func:`flashmaps.round_trip` the way they are usually written."""

    def mean_map(query: Tensor, key: Tensor) -> Tensor:  # [N, M]
        heads = torch.softmax(scale * query @ key.mT, dim=-1)[0]  # [H, N, M]
        return (head_weights[:, None, None] * heads).sum(0)

    a_st = mean_map(query_s, key_t)
    a_ts = mean_map(query_t, key_s)
    at = centres(grid_s)
    forward, backward = a_st.argmax(1), a_ts.argmax(1)
    moments = torch.cat((at, at.square().sum(1, keepdim=True)), dim=1)
    ends = a_st @ (a_ts @ moments)  # [N, 3]: E x, E y, E |x|^2
    square = ends[:, 2] - 2 * (at * ends[:, :2]).sum(1) + at.square().sum(1)
    density = torch.bincount(forward, minlength=a_st.shape[1])
    entropy = -torch.xlogy(a_ts, a_ts).sum(1)
    return {
        "forward": forward,
        "backward": backward,
        "hard_distance": (at - at[backward[forward]]).norm(dim=1),
        "soft_distance": (at - ends[:, :2]).norm(dim=1),
        "spread": square.clamp_min(0).sqrt(),
        "return_probability": (a_st * a_ts.mT).sum(1),
        "inverse_entropy": entropy,
        "density": density,
        "soft_density": a_st.sum(0),
        "nims": entropy / torch.where(density >= 2, density, torch.nan).log(),
    }


def _main(method: str, path: str) -> None:
    from safetensors import safe_open

    from flashmaps.maps.attention_map import AttentionMap

    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    torch.set_num_threads(settings["threads"])
    grid_s, grid_t = tuple(settings["grid_s"]), tuple(settings["grid_t"])
    scale, backend = settings["scale"], settings["backend"]

    def flashmaps(given: dict[str, Tensor], grid_s: Grid, grid_t: Grid) -> RoundTrip:
        options = {"scale": scale, "head_weights": given["head_weights"], "backend": backend}
        a_st = AttentionMap(
            given["query_s"], given["key_t"], query_grid=grid_s, key_grid=grid_t, **options
        )
        a_ts = AttentionMap(
            given["query_t"], given["key_s"], query_grid=grid_t, key_grid=grid_s, **options
        )
        return round_trip(a_st, a_ts)

    def eager(given: dict[str, Tensor], grid_s: Grid, grid_t: Grid) -> dict[str, Tensor]:
        return eager_round_trip(**given, scale=scale, grid_s=grid_s)

    run: Callable[[dict[str, Tensor], Grid, Grid], Any] = {"flashmaps": flashmaps, "eager": eager}[
        method
    ]
    # What a first call loads and keeps (modules, threads, their buffers) is not the price of a map:
    # make that happen on a map of 4 x 4 tokens before memory is noted.
    few = {name: t[:, :, :16] if t.ndim == 4 else t for name, t in tensors.items()}
    run(few, (4, 4), (4, 4))
    before = _reset_peak()
    result = run(tensors, grid_s, grid_t)
    peak = _peak_bytes() - before
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = run(tensors, grid_s, grid_t)
        seconds.append(time.perf_counter() - start)
    fields = result if isinstance(result, dict) else vars(result)
    report = {
        "seconds": sorted(seconds)[_REPEATS // 2],
        "peak_mb": max(0, peak) / 1e6,
        "threads": torch.get_num_threads(),
        "hard_ims": float(fields["hard_distance"].mean()),
        "soft_ims": float(fields["soft_distance"].mean()),
        "mean_ime": float(fields["inverse_entropy"].mean()),
    }
    print(json.dumps(report))


def _reset_peak() -> int:
    """Set the peak to the present memory where the system lets us; returns that, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return _status_bytes("VmRSS") or _peak_bytes()


def _peak_bytes() -> int:
    # Not ru_maxrss on Linux: a child inherits its parent's peak through fork there.
    peak = _status_bytes("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return peak


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


if __name__ == "__main__":
    _main(*sys.argv[1:])
