"""Pictures one after another: GIF files, and MP4 where ffmpeg is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashmaps.files import whole_file


def maps_of_frames(frames: int, maps: int) -> list[int]:
    """Which of ``maps`` latent frames each frame of a video is decoded from.

    Video autoencoders that look back in time (Wan, CogVideoX, Hunyuan) make one frame of the first
    and r of each other: frames = 1 + r (maps - 1). Other numbers are spread evenly.
    """
    if maps > 1 and (frames - 1) % (maps - 1) == 0:
        each = (frames - 1) // (maps - 1)
        return [-(-frame // each) for frame in range(frames)]
    return [frame * maps // frames for frame in range(frames)]


def write_animation(path: str | Path, frames: Iterable[Any], fps: float) -> Path:
    """Frames, [h, w, 3] uint8 each, as a file of the kind that its ending names.

    Raises ValueError for other endings, no frame or a rate that is not above zero, RuntimeError
    where there is no ffmpeg for an MP4.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".gif", ".mp4"):
        raise ValueError(f"path={str(path)!r} must end in .gif or .mp4")
    if not fps > 0:
        raise ValueError(f"fps={fps!r} must be above 0")
    if kind == ".mp4" and shutil.which("ffmpeg") is None:
        raise RuntimeError("an MP4 needs the program ffmpeg, which is not there; write a .gif")
    pictures = list(frames)
    if not pictures:
        raise ValueError("there are no frames to write")
    with whole_file(path) as new:
        if kind == ".gif":
            _write_gif(new, pictures, fps)
        else:
            _write_mp4(new, pictures, fps)
    return path


def _write_gif(path: Path, pictures: list[Any], fps: float) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(each) for each in pictures)
    # Pillow drops frames that are like the one before, and shows that one longer.
    first.save(path, format="GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)


def _write_mp4(path: Path, pictures: list[Any], fps: float) -> None:
    height, width = pictures[0].shape[:2]
    command = [
        "ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
        # Players want even sides and this layout of colours.
        "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-f", "mp4", str(path),
    ]  # fmt: skip
    data = b"".join(each.tobytes() for each in pictures)
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
