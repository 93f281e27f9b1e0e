"""Random writes into folders, met by kills and failing disks at random calls; commands killed.

    python tests/attack/folders.py --seconds 300 --seed 7

Two kinds of case. "steps": a room with output folders, runs, single files, and files of somebody
else, into which steps are taken that are killed, or fail, at a random call of the system; after
each, everything is as before it or as after it. "kills": a command of flashmaps is killed at a
random moment; then the same command is given again, and what it leaves is what an undisturbed one
leaves. The same seed draws the same steps; moments of kills are those of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":  # a program of its own: its neighbours, and tests/
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked children must not wait for threads

import faults
from flashmaps.files import MARKER, marker, open_run, whole_folder, write_text

Content = dict[str, str]
FATES = (faults.BEFORE, faults.AFTER, faults.FULL, faults.BROKEN)
GROW = ("eval", "segments", "study", "batch")  # commands whose folder grows, and goes on
TIMED = {"demo": ("results.json", "report.html")}  # files that say how long something took
NAMES = ("a.json", "b.png", "deep/c.txt", "deep/er/d.txt", "e \u00e9 \u2713.txt", "results.json")


def content(folder: Path) -> Content | None:
    """Every file below a folder, and its text, without markers and folders to work in."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER and not _work(path.relative_to(folder))
    }


def _work(path: Path) -> bool:
    return any(part.startswith(".flashmaps-") for part in path.parts)


def leftovers(root: Path) -> list[str]:
    """Folders to work in that nobody works in any more."""
    return [str(path) for path in root.rglob(".flashmaps-*")]


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A temporary folder, in memory where there is one: to sync to a disk takes its time."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


# -- steps -----------------------------------------------------------------------------------------


class Room:
    """Output folders beside somebody else's files, and what each of them has to hold."""

    FOLDERS, RUNS = ("match", "demo"), ("run", "deep/run")

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.draw = root, draw
        self.held: dict[str, Content | None] = dict.fromkeys((*self.FOLDERS, *self.RUNS))
        self.others = {"thesis.txt": "precious", "match.json": "{}", "album/unet/w": "precious"}
        for name, text in self.others.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.notes: dict[str, Content] = {name: {} for name in self.held}

    def files(self) -> Content:
        """A few files with new texts."""
        names = self.draw.sample(NAMES, self.draw.randint(1, len(NAMES)))
        return {name: f"{name} {self.draw.random()}" for name in names}

    def step(self, fate: str | None, at: int) -> str:
        """Take one, and hold the room to what it may be after it; says what was done."""
        kind = self.draw.choice(
            ("folder",) * 4 + ("run",) * 4 + ("file", "note", "note", "note", "lose")
        )
        name = self.draw.choice(self.FOLDERS if kind == "folder" else self.RUNS)
        return getattr(self, f"_{kind}")(name, fate, at)

    def _attempt(self, work: Callable[[], None], fate: str | None, at: int) -> str:
        if fate is None:
            work()
            return "done"
        said = faults.attempt(work, at, fate)
        return "done" if said == "through" else said

    def _hold(self, name: str, said: str, after: Content | None) -> None:
        """The folder is as before or as after, and with whoever opens it next for good."""
        before, notes = self.held[name], self.notes[name]
        folder = self.root / name
        if name in self.RUNS and folder.is_dir() and (folder / MARKER).exists():
            with open_run(folder, "run"):
                pass
        found = content(folder)
        ours = None if found is None else {k: v for k, v in found.items() if k not in notes}
        for note, text in notes.items():
            assert found is not None and found.get(note) == text, f"{name}: {note} is lost"
        allowed = (after,) if said == "done" else (before, after)
        assert (ours or None) in [each or None for each in allowed], (name, said, ours, allowed)
        self.held[name] = ours
        for other, text in self.others.items():
            assert (self.root / other).read_text() == text, f"{other} is not what it was"

    def _folder(self, name: str, fate: str | None, at: int) -> str:
        files = self.files()

        def work() -> None:
            with whole_folder(self.root / name, name) as new, faults.aside():
                _fill(new, files)

        if self.notes[name]:
            try:
                work()
            except ValueError as error:
                assert all(repr(note) in str(error) for note in list(self.notes[name])[:3]), error
                self._hold(name, "refused", self.held[name])
                return f"{name}: refused"
            raise AssertionError(f"{name} was replaced with notes in it")
        said = self._attempt(work, fate, at)
        self._hold(name, said, files)
        return f"{name}: {said}"

    def _run(self, name: str, fate: str | None, at: int) -> str:
        files, held = self.files(), self.held[name] or {}
        gone = self.draw.sample(sorted(held), self.draw.randint(0, len(held)))
        blocked = set(files) & set(self.notes[name])

        def work() -> None:
            with open_run(self.root / name, "run") as run, run.files(instead_of=gone) as new:
                with faults.aside():
                    _fill(new, files)

        if blocked:
            try:
                work()
            except ValueError as error:
                assert "where results have to go" in str(error), error
                self._hold(name, "refused", self.held[name])
                return f"{name}: refused"
            raise AssertionError(f"{name}: a note was written over")
        said = self._attempt(work, fate, at)
        kept = {key: text for key, text in held.items() if key not in gone}
        self._hold(name, said, {**kept, **files})
        return f"{name}: {said}"

    def _file(self, name: str, fate: str | None, at: int) -> str:
        text = str(self.draw.random())
        path = self.root / "album" / "single.txt"
        before = path.read_text() if path.exists() else None
        said = self._attempt(lambda: write_text(path, text), fate, at)
        found = path.read_text() if path.exists() else None
        assert found in ((text,) if said == "done" else (before, text)), (said, found)
        return f"file: {said}"

    def _note(self, name: str, fate: str | None, at: int) -> str:
        """Somebody puts a file of their own into an output folder, or takes it out again."""
        name = self.draw.choice(sorted(self.held))
        if self.notes[name] and self.draw.random() < 0.4:
            for note in self.notes[name]:
                (self.root / name / note).unlink()
            self.notes[name] = {}
        elif self.held[name]:
            note = self.draw.choice(("note.txt", "z.json", *NAMES))
            if note not in (content(self.root / name) or {}) and "/" not in note:
                self.notes[name] = {**self.notes[name], note: "mine"}
                (self.root / name / note).write_text("mine")
        return f"{name}: note"

    def _lose(self, name: str, fate: str | None, at: int) -> str:
        """Somebody deletes a file of a run: it is known to be gone, and nothing else is."""
        held = self.held[name]
        if held:
            lost = self.draw.choice(sorted(held))
            (self.root / name / lost).unlink()
            with open_run(self.root / name, "run") as run:
                assert not run.whole(lost) and all(run.whole(k) for k in held if k != lost)
                run.remove([lost])
            self.held[name] = {k: v for k, v in held.items() if k != lost}
            self._hold(name, "done", self.held[name])
        return f"{name}: lost"

    def end(self) -> None:
        """After one undisturbed step everywhere nothing is left of those that died."""
        for name in self.held:
            for note in self.notes[name]:
                (self.root / name / note).unlink()
            self.notes[name] = {}
        for name in self.FOLDERS:
            self._folder(name, None, 0)
        for name in self.RUNS:
            self._run(name, None, 0)
        self._file("", None, 0)
        assert not leftovers(self.root), leftovers(self.root)


def _fill(folder: Path, files: Content) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def steps(seed: int, count: int = 25) -> int:
    """One room, and ``count`` steps in it. Raises AssertionError for what does not hold."""
    draw = random.Random(seed)
    with place() as root:
        room, done = Room(root, draw), []
        try:
            for _ in range(count):
                fate = draw.choice((None, *FATES, *FATES))
                at = draw.randint(1, 120)
                done.append(f"{fate} at {at}, {room.step(fate, at)}")
            room.end()
        except Exception as error:
            told = "\n  ".join(done)
            raise AssertionError(f"steps({seed}, {count}): {error!r} after\n  {told}") from error
    return count


# -- kills -----------------------------------------------------------------------------------------


class Commands:
    """The commands that write, each on a tiny model, in children of this process."""

    def __init__(self, root: Path) -> None:
        import numpy as np
        import torch
        from flashmaps.diffusion.loading import load_model
        from PIL import Image
        from tiny_pipeline import tiny_pipeline

        torch.set_num_threads(1)
        self.root = root
        tiny_pipeline(root / "tokenizer").save_pretrained(root / "tiny")
        load_model(str(root / "tiny"))  # kept: the children have it
        for needed in ("matplotlib.figure", "pyarrow.parquet", "scipy.ndimage", "skimage.feature",
                       "skimage.segmentation", "sklearn.metrics", "flashmaps.evaluation.run",
                       "flashmaps.app.commands", "flashmaps.evaluation.figures",
                       "flashmaps.matching.plots", "flashmaps.app.demo",
                       "flashmaps.segmentation.cosegment", "flashmaps.evaluation.study",
                       "flashmaps.evaluation.segments"):  # fmt: skip
            importlib.import_module(needed)
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photo.png")
        Image.fromarray(pixels[::-1]).save(root / "other.png")
        Image.fromarray(pixels[:, ::-1]).save(root / "third.png")
        model = ["--model", str(root / "tiny"), "--size", "64"]
        photo, layers = str(root / "photo.png"), ["--layers", "up_blocks.1.*.attn1"]
        self.commands = {
            "match": ["match", photo, photo, *model],
            "eval": ["eval", "world", "--pairs", "9", "--points", "8", "--resamples", "20",
                     *model, *layers],
            "batch": ["batch", photo, str(root / "other.png"), str(root / "third.png"), *model],
            "world": ["world", "--count", "4", "--pairs", "2", "--size", "32"],
            "segment": ["segment", photo, str(root / "other.png"), *model],
            "cosegment": ["cosegment", photo, str(root / "other.png"), *model],
            "segments": ["eval", "segments", "--pairs", "2", "--image-size", "32",
                         "--resamples", "10", *model[:2]],
            "demo": ["demo", *model, *layers],
            "study": ["study", "--pairs", "2", "--points", "4", "--test-pairs", "2", "--compare",
                      "kk", "--timestep", "5", "--noises", "1", *model],
        }  # fmt: skip
        self.whole: dict[str, Content] = {}
        self.seconds: dict[str, float] = {}

    def arguments(self, name: str, room: Path) -> list[str]:
        """With the place to write: a folder, or the picture of ``world``."""
        out = room / ("out" if name != "world" else "out.png")
        return [*self.commands[name], "--out", str(out)]

    def run(self, name: str, room: Path, kill_after: float | None = None) -> bool:
        """Run a command in a child; whether it came to its end."""
        child = os.fork()
        if child == 0:
            code = 70
            try:
                null = os.open(os.devnull, os.O_RDWR)
                said = os.open(self.root / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                for stream, to in ((0, null), (1, null), (2, said)):
                    os.dup2(to, stream)
                # So that one that hangs can be asked where.
                faulthandler.register(signal.SIGUSR1, file=said, all_threads=True)
                from flashmaps.app.commands import make_app

                make_app()(self.arguments(name, room), standalone_mode=False)
                code = 0
            finally:
                os._exit(code)
        began = time.monotonic()
        limit = 300.0 if kill_after is None else kill_after
        while time.monotonic() - began < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                said = (self.root / "said").read_text(errors="replace")[-2000:]
                assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, (name, said)
                return True
            time.sleep(0.002)
        if kill_after is None:
            os.kill(child, signal.SIGUSR1)
            time.sleep(2.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        where = (self.root / "said").read_text(errors="replace")[-4000:]
        assert kill_after is not None, f"{name} does not end:\n{where}"
        return False

    def told(self, name: str, room: Path) -> Content | None:
        """What was written, as text that two runs have in common."""
        if name == "world":
            path = room / "out.png"
            return {"out.png": path.read_bytes().hex()} if path.exists() else None
        folder = room / "out"
        state = marker.read(folder) if folder.is_dir() else None
        if state is None:
            return None
        varies = TIMED.get(name, ())
        return {
            key: "" if key in varies else digest for key, (_, digest) in sorted(state.files.items())
        }

    def prepare(self, name: str) -> None:
        """Once undisturbed: what is written, and how long it takes."""
        if name not in self.whole:
            room = self.root / f"whole-{name}"
            room.mkdir()
            began = time.monotonic()
            self.run(name, room)
            self.seconds[name] = time.monotonic() - began
            found = self.told(name, room)
            assert found
            self.whole[name] = found

    def kill(self, name: str, number: int, draw: random.Random) -> str:
        """Kill a command at a random moment, twice, and give it again to its end."""
        self.prepare(name)
        room = self.root / f"{name}-{number}"
        room.mkdir()
        (room / "thesis.txt").write_text("precious")
        before = None
        if draw.random() < 0.5:  # over a finished one
            self.run(name, room)
            before = self.told(name, room)
        said = []
        for _ in range(2):
            ended = self.run(name, room, draw.random() * 1.2 * self.seconds[name])
            said.append("ended" if ended else "killed")
            found = self.told(name, room)
            if ended or (before is not None and name not in GROW):
                assert self._same(name, found), f"{name}: another result"
            if before is not None:
                assert found is not None, f"{name}: the finished one is gone"
                self._check(name, room)
            if name in GROW and before is None and (room / "out").is_dir():
                (room / "out" / "note.txt").write_text("mine")
        assert self.run(name, room)
        assert self._same(name, self.told(name, room)), f"{name}: another result in the end"
        self._check(name, room)
        note = room / "out" / "note.txt"
        assert not note.exists() or note.read_text() == "mine"
        assert (room / "thesis.txt").read_text() == "precious"
        assert not leftovers(room), leftovers(room)
        kept = {"thesis.txt", "out.png" if name == "world" else "out"}
        assert {path.name for path in room.iterdir()} == kept
        shutil.rmtree(room)
        return f"{name}: {', '.join(said)}"

    def _same(self, name: str, found: Content | None) -> bool:
        """Equal to the undisturbed one, in every byte of every file."""
        return found == self.whole[name]

    def _check(self, name: str, room: Path) -> None:
        """Every listed file is there as it was written, and results can be read."""
        if name == "world":
            return
        folder = room / "out"
        state = marker.read(folder)
        assert state is not None
        for key, sealed in state.files.items():
            if not state.waiting or (folder / key).exists():
                assert marker.seal(folder / key) == sealed, f"{name}: {key} is not whole"
        for key in ("match.json", "results.json"):
            if key in state.files:
                json.loads((folder / key).read_text())


def kills(count: int, seed: int, names: tuple[str, ...] | None = None) -> list[str]:
    """Kill each command in turn until there were ``count`` kills; what became of each case."""
    draw, said = random.Random(seed), list[str]()
    with place() as root:
        commands = Commands(root)
        names = names or tuple(commands.commands)
        while sum(each.count("killed") for each in said) < count:
            number = len(said)
            said.append(commands.kill(names[number % len(names)], number, draw))
    return said


def main() -> None:
    """Attack for some time; exits with 1 at the first case that does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends = time.monotonic() + given.seconds
    draw = random.Random(given.seed)
    taken = cases = killed = 0
    with place() as root:
        commands = Commands(root)
        names = tuple(commands.commands)
        while time.monotonic() < ends:
            for _ in range(5):
                taken += steps(given.seed + taken)
            said = commands.kill(names[cases % len(names)], cases, draw)
            cases, killed = cases + 1, killed + said.count("killed")
            print(said, flush=True)
    print(f"folders: {taken} steps and {killed} kills from seed {given.seed}, all held")


if __name__ == "__main__":
    main()
