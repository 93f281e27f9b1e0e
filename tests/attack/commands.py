"""Random command lines: each ends in 0 or 2, in words, and changes nothing that it should not.

    python tests/attack/commands.py --seconds 60 --seed 7

A line that works is taken, and some of its values are replaced by others that no one should give.
The same seed draws the same lines.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # a program of its own: its neighbours, and tests/
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

# Numbers that are wrong, or right and small; nothing that is right and takes minutes.
NUMBERS = ("-1", "0", "1", "2", "-0", "1e3", "nan", "inf", "", " ", "0x10", "1_0", "\u0663",
           "1" * 30, "1" + "0" * 400, "-" + "9" * 20, "1.5", "x")  # fmt: skip
TEXTS = ("", " ", "[/x]", "[bold]", "\x1b[31m", "a|b", "<b>", "\u202e", "'", '"', "%s", "{x}",
         "{0}", "\\", "$(x)", "\ud800", "\n", "\U0001f600", "n" * 300, "--out", "-", "..",
         "*", "[", "kk")  # fmt: skip
# Values that are right, and quick.
GOOD = {
    "--timestep": "5", "--seed": "3", "--noise-seed": "4", "--size": "32", "--compare": "kk",
    "--prompt": "[/x] | <b>", "--backend": "reference", "--pairs": "2", "--points": "3",
    "--resamples": "5", "--image-size": "32", "--split": "validation", "--device": "cpu",
    "--dtype": "bfloat16", "--count": "2", "--category": "cat",
}  # fmt: skip
TINY = "--model {tiny} --size 64"
LINES = {
    "match": "match {photo} {photo} " + TINY,
    "eval": "eval world --pairs 1 --points 4 --resamples 10 --layers up_blocks.1.*.attn1 " + TINY,
    "batch": "batch {photo} {other} " + TINY,
    "world": "world --count 1 --pairs 0 --size 16",
    "segment": "segment {photo} " + TINY,
    "cosegment": "cosegment {photo} {other} " + TINY,
    "parts": "parts {photo} {other} --steps 1 " + TINY,
    "segments": "eval segments --pairs 1 --image-size 32 --resamples 10 --model {tiny}",
    "completion": "eval completion --pairs 1 --images 2 --image-size 32 --resamples 10 --model "
    "{nowhere}",
    "complete": "complete {photo} {nowhere}",
    # These take long where they work: they get something wrong besides.
    "study": "study --model {nowhere}",
    "demo": "demo --model {nowhere}",
}
OPTIONS = {
    "match": {"--timestep": NUMBERS, "--seed": NUMBERS, "--size": NUMBERS, "--layers": TEXTS,
              "--prompt": TEXTS, "--compare": TEXTS, "--backend": TEXTS, "--model": "paths",
              "--out": "paths"},
    "eval": {"--timestep": NUMBERS, "--noise-seed": NUMBERS, "--size": NUMBERS, "--seed": NUMBERS,
             "--pairs": NUMBERS, "--points": NUMBERS, "--resamples": NUMBERS,
             "--image-size": NUMBERS, "--layers": TEXTS, "--prompt": TEXTS, "--split": TEXTS,
             "--compare": TEXTS, "--device": TEXTS, "--dtype": TEXTS, "--data": "paths",
             "--model": "paths", "--out": "paths"},
    "batch": {"--timestep": NUMBERS, "--seed": NUMBERS, "--size": NUMBERS, "--number": NUMBERS,
              "--memory-budget": NUMBERS, "--layers": TEXTS, "--compare": TEXTS, "--pairs": TEXTS,
              "--rows": TEXTS, "--stage": TEXTS, "--dtype": TEXTS, "--device": TEXTS,
              "--model": "paths", "--out": "paths"},
    "world": {"--count": NUMBERS, "--pairs": NUMBERS, "--size": NUMBERS, "--seed": NUMBERS,
              "--split": TEXTS, "--category": TEXTS, "--out": "paths"},
    "segment": {"--timestep": NUMBERS, "--seed": NUMBERS, "--size": NUMBERS, "--count": NUMBERS,
                "--layers": TEXTS, "--backend": TEXTS, "--model": "paths", "--out": "paths"},
    "cosegment": {"--timestep": NUMBERS, "--seed": NUMBERS, "--size": NUMBERS, "--count": NUMBERS,
                  "--layers": TEXTS, "--backend": TEXTS, "--model": "paths", "--out": "paths"},
    "parts": {"--steps": ("0", "-1", "x", "1e9", "2"), "--batch": NUMBERS, "--tokens": NUMBERS,
              "--seed": NUMBERS, "--size": NUMBERS, "--loss": TEXTS, "--model": "paths",
              "--out": "paths"},
    "segments": {"--timestep": NUMBERS, "--noise-seed": NUMBERS, "--size": NUMBERS,
                 "--seed": NUMBERS, "--pairs": NUMBERS, "--points": NUMBERS,
                 "--resamples": NUMBERS, "--image-size": NUMBERS, "--split": TEXTS,
                 "--compare": TEXTS, "--device": TEXTS, "--data": "paths", "--model": "paths",
                 "--out": "paths"},
    "completion": {"--seed": NUMBERS, "--pairs": NUMBERS, "--points": NUMBERS,
                   "--resamples": NUMBERS, "--image-size": NUMBERS, "--images": NUMBERS,
                   "--split": TEXTS, "--data": "paths", "--out": "paths"},
    "complete": {"--samples": NUMBERS, "--seed": NUMBERS, "--steps": NUMBERS, "--visible": "paths",
                 "--occluder": "paths", "--model": "paths", "--out": "paths"},
    "study": {"--points": NUMBERS, "--seed": NUMBERS, "--noises": NUMBERS, "--size": NUMBERS,
              "--timestep": NUMBERS, "--compare": TEXTS, "--device": TEXTS, "--out": "paths"},
    "demo": {"--size": NUMBERS, "--timestep": NUMBERS, "--seed": NUMBERS, "--compare": TEXTS,
             "--layers": TEXTS, "--backend": TEXTS, "--out": "paths"},
}  # fmt: skip


class Attack:
    """A folder with good and bad files, and lines that name them."""

    def __init__(self, root: Path) -> None:
        import numpy as np
        import torch
        from PIL import Image
        from tiny_pipeline import tiny_pipeline

        torch.set_num_threads(1)
        self.root = root
        tiny_pipeline(root / "tokenizer").save_pretrained(root / "tiny")
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photo.png")
        Image.fromarray(pixels[::-1]).save(root / "other.png")
        (root / "full").mkdir()
        (root / "full" / "thesis.txt").write_text("precious")
        (root / "file").write_text("precious")
        os.mkfifo(root / "pipe")
        (root / "loop").symlink_to(root / "loop")
        (root / "\x1b[31m[b]").write_text("precious")
        self.paths = [*(str(path) for path in root.iterdir()), "/dev/null", "/dev/full", "/proc/x",
                      "", ".", "n" * 300, "a/b", "owner/name", str(root / "file" / "x"),
                      str(root / "full" / "new" / "er"), "\ud800"]  # fmt: skip
        self.before = self._everything()

    def _everything(self) -> dict[str, str]:
        """Every file but the tiny model's, and its text."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if path.is_file() and "tiny" not in path.parts and "tokenizer" not in path.parts:
                    found[str(path)] = path.read_bytes().hex()[:200]
        return found

    def line(self, draw: random.Random) -> list[str]:
        """A random command line."""
        name = draw.choice(list(LINES))
        values = {"tiny": self.root / "tiny", "photo": self.root / "photo.png",
                  "other": self.root / "other.png", "nowhere": self.root / "nowhere"}  # fmt: skip
        words = [word.format_map(values) for word in LINES[name].split()]
        if draw.random() < 0.3 and name in ("match", "batch", "cosegment"):
            words[draw.randint(1, 2)] = draw.choice(self.paths)
        out = self.root / ("out.png" if name == "world" else "out")
        words += ["--out", str(out)]
        for option in draw.sample(list(OPTIONS[name]), draw.randint(1, 2)):
            choices = OPTIONS[name][option]
            bad = draw.choice(self.paths if choices == "paths" else choices)
            words += [option, GOOD[option] if option in GOOD and draw.random() < 0.5 else bad]
        return words

    def run(self, words: list[str]) -> int:
        """Run one, and hold it to what a command promises; its exit code."""
        from flashmaps.app.commands import make_app
        from typer.testing import CliRunner

        told = shlex.join(words).encode("unicode_escape").decode()
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)
            try:
                result = CliRunner().invoke(make_app(), words)
            finally:
                os.chdir(here)
            stray = os.listdir(work)
        said = result.stderr + result.stdout
        where = f"{told}\n{said[-2000:]}"
        fault = result.exception
        assert fault is None or isinstance(fault, SystemExit), f"{fault!r}: {where}"
        # 1: a backend that cannot run here.
        assert result.exit_code in (0, 2) or "cannot run this" in said, (
            f"{result.exit_code}: {where}"
        )
        assert "Traceback" not in said and "\x1b" not in said, where
        assert result.exit_code == 0 or "flashmaps: " in said or "Usage: " in said, where
        made = {path for path in self._everything() if path not in self.before}
        # How many tokens an image has is known when the first are made, and those stay for a next
        # call with a larger budget.
        kept = "memory_budget = " in said and "is too small" in said and words[0] == "batch"
        if result.exit_code and not kept:
            assert not made and not stray, f"left behind: {made} {stray}: {where}"
        for path, text in self.before.items():
            assert Path(path).read_bytes().hex()[:200] == text, (
                f"{path} is not what it was: {where}"
            )
        assert not list(self.root.rglob(".flashmaps-*")), f"leftovers: {where}"
        for path in made:
            Path(path).unlink()
        for path in (self.root / "out", self.root / "full" / "new"):
            shutil.rmtree(path, ignore_errors=True)
        return result.exit_code


def lines(count: int, seed: int) -> dict[int, int]:
    """Run ``count`` lines; how many ended with each code."""
    draw, ended = random.Random(seed), dict.fromkeys((0, 1, 2), 0)
    with tempfile.TemporaryDirectory() as root:
        attack = Attack(Path(root))
        for _ in range(count):
            ended[attack.run(attack.line(draw))] += 1
    return ended


def main() -> None:
    """Attack for some time; exits with 1 at the first line that does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends, draw, count = time.monotonic() + given.seconds, random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as root:
        attack = Attack(Path(root))
        while time.monotonic() < ends:
            attack.run(attack.line(draw))
            count += 1
    print(f"commands: {count} lines from seed {given.seed}, all held")


if __name__ == "__main__":
    main()
