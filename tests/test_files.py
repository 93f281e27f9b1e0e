"""Files and folders that are whole, or as they were, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import faults
import pytest
from flashmaps.files import (
    MARKER,
    check_folder,
    discard,
    folders,
    open_run,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)

OLD = {"numbers.json": "1", "pictures/a.png": "old a", "pictures/b.png": "old b"}
NEW = {"numbers.json": "2", "pictures/a.png": "new a", "more/c.png": "new c"}


def fill(folder, files):
    with faults.aside():
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def make(folder, files, kind="match"):
    with whole_folder(folder, kind) as new:
        fill(new, files)


def content(folder):
    """Every file below a folder, and its text; but for the marker, and folders to work in."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MARKER
        and not path.relative_to(folder).parts[0].startswith(".flashmaps-")
    }


def leftovers(*places):
    return [p.name for place in places for p in place.iterdir() if p.name.startswith(".flashmaps")]


# -- what is ours ----------------------------------------------------------------------------------


def test_a_folder_is_made_and_made_anew(tmp_path):
    out = tmp_path / "deep" / "out"
    make(out, OLD)
    assert content(out) == OLD
    make(out, NEW)
    assert content(out) == NEW and not leftovers(out.parent)
    assert sorted(path.name for path in out.iterdir()) == [
        MARKER, "more", "numbers.json", "pictures",
    ]  # fmt: skip


def test_the_marker_names_kind_and_files(tmp_path):
    make(tmp_path / "out", OLD)
    first, second = map(json.loads, (tmp_path / "out" / MARKER).read_text().splitlines())
    assert first == {"format": "flashmaps folder 1", "kind": "match", "settings": None}
    assert {name: size for name, (size, _) in second["files"].items()} == {
        name: len(text) for name, text in OLD.items()
    }


@pytest.mark.parametrize("name", ["match.json", "results.json", "run.json", "model_index.json"])
def test_a_file_of_a_results_name_makes_no_folder_ours(tmp_path, name):
    fill(tmp_path / "model", {name: "{}", "unet/weights": "precious", "vae/weights": "precious"})
    for kind in ("match", "demo", "evaluation", "model"):
        with (
            pytest.raises(ValueError, match=r"holds other files \('"),
            whole_folder(tmp_path / "model", kind),
        ):
            raise AssertionError("the work has begun")
        with pytest.raises(ValueError, match="holds other files"):
            check_folder(tmp_path / "model", kind)
        with (
            pytest.raises(ValueError, match="holds other files"),
            open_run(tmp_path / "model", kind),
        ):
            raise AssertionError("the work has begun")
    assert len(content(tmp_path / "model")) == 3 and not leftovers(tmp_path, tmp_path / "model")


def test_strange_files_are_named_and_stay(tmp_path):
    out = tmp_path / "out"
    make(out, OLD)
    (out / "note.txt").write_text("mine")
    (out / "pictures" / "z.png").write_text("mine")
    (out / "empty").mkdir()
    with pytest.raises(ValueError) as caught:
        make(out, NEW)
    assert "('empty/', 'note.txt', 'pictures/z.png')" in str(caught.value)
    assert content(out) == {**OLD, "note.txt": "mine", "pictures/z.png": "mine"}


def test_many_strange_files_are_counted(tmp_path):
    fill(tmp_path, {f"{i}.txt": "" for i in range(9)})
    with pytest.raises(ValueError, match=r"'4\.txt' and 4 more"):
        check_folder(tmp_path, "match")


def test_another_kind_is_never_ours(tmp_path):
    out = tmp_path / "out"
    make(out, OLD)
    with pytest.raises(ValueError, match="has written as 'match', and would be replaced as 'demo'"):
        make(out, NEW, "demo")
    with pytest.raises(ValueError, match="written as 'match'"), open_run(out, "evaluation"):
        pass
    assert content(out) == OLD


HEADER = '{"format": "flashmaps folder 1", "kind": "match", "settings": null}\n'


@pytest.mark.parametrize(
    "text",
    [
        "{}\n", "[]\n", "no json\n", "\x00\xff", '{"format": "other"}\n', "[" * 99_999 + "\n",
        '{"format": "flashmaps folder 1"}\n', '{"format": "flashmaps folder 1", "kind": 3}\n',
        HEADER + '{"files": {"../victim": [1, ""]}}\n', HEADER + '{"files": {"/etc/x": [1, ""]}}\n',
        HEADER + '{"files": 3}\n', HEADER + '{"gone": ["../victim"]}\n', HEADER + "3\n",
        HEADER + '{"files": {"a": 7}}\n', HEADER + '{"commit": "../up/0", "files": {}}\n',
        HEADER + '{"commit": "sub/0", "files": {}}\n', HEADER + '{"children": ["../up"]}\n',
    ],
)  # fmt: skip
def test_a_marker_that_somebody_made_up_is_refused(tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_bytes(text.encode("latin-1"))
    (tmp_path / "victim").write_text("precious")
    with pytest.raises(ValueError, match="that flashmaps has not written"):
        make(out, NEW)
    with pytest.raises(ValueError, match="that flashmaps has not written"), open_run(out, "match"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_marker_does_not_reach_through_links(tmp_path):
    """A folder from somewhere else, made to move or delete files outside of itself."""
    out, secret = tmp_path / "out", tmp_path / "secret"
    fill(secret, {"0/key": "precious", "key": "precious"})
    for listed in ('{"files": {"link/key": [1, ""]}}', '{"commit": ".flashmaps-a/0", "files": '
                   '{"key": [1, ""]}}'):  # fmt: skip
        out.mkdir()
        (out / MARKER).write_text(HEADER + listed + "\n")
        (out / "link").symlink_to(secret)
        (out / ".flashmaps-a").symlink_to(secret)
        with pytest.raises(ValueError, match="holds other files"):
            make(out, NEW)
        with open_run(out, "match") as run:
            run.remove(["link/key"])
        discard(out)
        assert content(secret) == {"0/key": "precious", "key": "precious"}
        shutil.rmtree(out)


def test_links_to_output_folders_stay_links(tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    for files in (OLD, NEW):
        make(link, files)
        assert link.is_symlink() and content(real) == files
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "disk" / "later")
    make(dangling, OLD)
    assert dangling.is_symlink() and content(tmp_path / "disk" / "later") == OLD
    linked = tmp_path / "file"
    linked.symlink_to(real / "text")
    write_text(linked, "through")
    assert linked.is_symlink() and (real / "text").read_text() == "through"


def test_permissions_of_what_is_replaced_stay(tmp_path):
    out = tmp_path / "out"
    make(out, OLD)
    out.chmod(0o750)
    make(out, NEW)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    write_text(tmp_path / "a", "1")
    (tmp_path / "a").chmod(0o600)
    write_text(tmp_path / "a", "2")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_files_that_file_managers_leave_do_not_matter(tmp_path):
    out = tmp_path / "out"
    make(out, OLD)
    (out / ".DS_Store").write_text("")
    make(out, NEW)
    assert content(out) == {**NEW, ".DS_Store": ""}


# -- nothing changes before the work is done -------------------------------------------------------


def test_work_that_fails_changes_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="stop"), whole_folder(out, "match") as new:
        fill(new, NEW)
        raise RuntimeError("stop")
    assert not out.parent.exists()
    make(out, OLD)
    with pytest.raises(RuntimeError, match="stop"), whole_folder(out, "match") as new:
        fill(new, NEW)
        raise RuntimeError("stop")
    assert content(out) == OLD and not leftovers(out.parent)
    with pytest.raises(RuntimeError, match="stop"), open_run(tmp_path / "x" / "run", "evaluation"):
        raise RuntimeError("stop")
    assert not (tmp_path / "x").exists()


def test_files_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as new:
        new.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(path, float("nan"))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_what_is_no_place_for_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path, text in (
        ("file", "is a file; give a folder to write to"),
        ("file/in", "which is a file; give a folder to write to"),
        ("pipe", "is a file; give a folder"),
        ("nul\0", "cannot be a folder's name"),
    ):
        with pytest.raises(ValueError, match=text):
            check_folder(tmp_path / path, "match")
        with pytest.raises(ValueError, match=text):
            make(tmp_path / path, NEW)
        with pytest.raises(ValueError, match=text), open_run(tmp_path / path, "evaluation"):
            pass
    for path, text in (
        ("pipe", "is no ordinary file; give a file"),
        (".", "is a folder; give a file"),
        ("nowhere/a", "there is no such folder to put it in"),
        ("nul\0", "cannot be a file's name"),
    ):
        with pytest.raises(ValueError, match=text):
            write_text(tmp_path / path, "x")
    with pytest.raises(ValueError, match="is no ordinary file"):
        write_text("/dev/null", "x")
    with pytest.raises(OSError, match="cannot be written: a name in it is too long"):
        make(tmp_path / ("n" * 300), NEW)


# -- two writers -----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_before_its_work(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # a new folder, and one that is replaced
        with whole_folder(out, "match") as new:
            with pytest.raises(ValueError, match="is being written by another process"):
                make(out, OLD)
            fill(new, NEW)
        assert content(out) == NEW
    make(tmp_path / "other", OLD)  # beside it: nobody is in the way
    with open_run(tmp_path / "run", "evaluation") as run:
        with (
            pytest.raises(ValueError, match="is being written by another process"),
            open_run(tmp_path / "run", "evaluation"),
        ):
            pass
        run.write_text("a", "1")
    assert content(tmp_path / "run") == {"a": "1"}


def of_several(works):
    """What each of several processes says, started together."""
    found = []
    for work in works:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writable, str(work()).encode())
            finally:
                os._exit(0)
        os.close(writable)
        found.append((child, readable))
    said = []
    for child, readable in found:
        with os.fdopen(readable, "rb") as pipe:
            said.append(pipe.read().decode())
        os.waitpid(child, 0)
    return said


def test_of_processes_that_start_together_one_writes(tmp_path):
    def writer(number):
        try:
            with whole_folder(tmp_path / "out", "match") as new:
                (new / "who").write_text(str(number))
                time.sleep(2)
        except ValueError as error:
            return "refused" if "is being written by another process" in str(error) else error
        return "wrote"

    said = of_several([lambda n=n: writer(n) for n in range(4)])
    assert sorted(said) == ["refused", "refused", "refused", "wrote"]
    assert content(tmp_path / "out") == {"who": str(said.index("wrote"))}
    assert not leftovers(tmp_path)


def test_what_a_dead_process_left_is_cleared_and_what_is_not_ours_stays(tmp_path):
    def dies():
        with whole_folder(tmp_path / "out", "match") as new:
            fill(new, OLD)
            os.kill(os.getpid(), signal.SIGKILL)

    assert of_several([dies]) == [""]
    assert len(leftovers(tmp_path)) == 1 and not (tmp_path / "out").exists()
    fill(tmp_path / ".flashmaps-notes", {"a.txt": "mine", "owner": "me"})
    fill(tmp_path / ".flashmaps-more", {"a.txt": "mine", "owner": ""})
    make(tmp_path / "elsewhere", OLD)
    assert sorted(leftovers(tmp_path)) == [".flashmaps-more", ".flashmaps-notes"]
    assert content(tmp_path / ".flashmaps-notes") == {"a.txt": "mine", "owner": "me"}


def test_a_forked_child_that_leaves_takes_nothing_along(tmp_path):
    def parent():
        with whole_folder(tmp_path / "out", "match") as new:
            fill(new, NEW)
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
        return "done"

    assert of_several([parent]) == ["done"]
    assert content(tmp_path / "out") == NEW and not leftovers(tmp_path)


# -- faults at every system call -------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path):
    """A folder in memory where there is one: syncing thousands of times to a disk takes minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


def replace_folder(place):
    make(place / "out", NEW)


def write_file(place):
    write_text(place / "out" / "numbers.json", "2")


def commit(place):
    with open_run(place / "out", "match") as run, run.files(instead_of=list(OLD)) as new:
        fill(new, NEW)


# How each is done: (work, what is there before, after, whether a crash may leave a mixture that
# the next to open the folder mends).
WAYS = {
    "new folder": (replace_folder, None, NEW, False),
    "folder": (replace_folder, OLD, NEW, False),
    "folder, no exchange": (replace_folder, OLD, NEW, True),
    "folder, inside": (replace_folder, OLD, NEW, True),
    "file": (write_file, OLD, {**OLD, "numbers.json": "2"}, False),
    "run": (commit, OLD, NEW, True),
}


def run_through(place, monkeypatch, way, how):
    """Meet one fate at every call, one after the other; how many calls there are."""
    work, before, after, mixed = WAYS[way]
    if way == "folder, no exchange":
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    if way == "folder, inside":
        monkeypatch.setattr(folders, "_only_inside", lambda target: target.is_dir())
    root, template = place, place / "template"
    template.mkdir()
    if before is not None:
        make(template / "out", before)
    fill(template, {"beside.txt": "precious", "outer/a": "precious"})
    for at in range(1, 1000):
        place = root / str(at)
        shutil.copytree(template, place)
        said = faults.attempt(lambda here=place: work(here), at, how)
        if said == "through":
            return at
        if how in (faults.FULL, faults.BROKEN):
            why = {faults.FULL: "disk is full", faults.BROKEN: "disk reports an error"}[how]
            assert said == "done" or (said.startswith("NotWritten: ") and why in said), (at, said)
        else:
            assert said in ("killed", "done"), (at, said)
        if mixed and (place / "out").is_dir():
            with open_run(place / "out", "match"):
                pass
        found = content(place / "out") if (place / "out").exists() else None
        assert found in (before, after, {} if before is None and mixed else after), (at, said)
        if said == "done":
            assert found == after, (at, said)
        make(place / "out", {"third": "3"})  # whoever comes next finds nothing in the way
        assert content(place / "out") == {"third": "3"}, (at, said)
        assert not leftovers(place, place / "out"), (at, said)
        assert (place / "beside.txt").read_text() == "precious"
        assert content(place / "outer") == {"a": "precious"}
        shutil.rmtree(place)
    raise AssertionError("more calls than expected")


# A process to kill is forked for each call, which takes its time.
FATES = [
    pytest.param(way, how, marks=pytest.mark.slow)
    if how == faults.AFTER or (how == faults.BEFORE and way.startswith("folder, "))
    else (way, how)
    for way in WAYS
    for how in (faults.BEFORE, faults.AFTER, faults.FULL, faults.BROKEN)
]


@pytest.mark.parametrize(("way", "how"), FATES)
def test_a_fault_at_any_call_leaves_old_or_new(quick, monkeypatch, way, how):
    assert run_through(quick, monkeypatch, way, how) > 20


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Synced: every new file and folder before the exchange, and the folder above after it."""
    out, synced, at = tmp_path / "out", [], []
    make(out, OLD)
    original, exchanged = os.fsync, folders.exchange

    def fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(folders, "exchange", lambda *a: at.append(len(synced)) or exchanged(*a))
    make(out, NEW)
    before, after = synced[: at[0]], synced[at[0] :]
    assert {"numbers.json", "a.png", "c.png", "pictures", "more", "new", MARKER} <= set(before)
    assert tmp_path.name in after


def test_what_comes_in_at_the_last_moment_is_carried_over(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(out, OLD)
    exchanged = folders.exchange

    def exchange(new, target):
        fill(target, {"note.txt": "mine", "numbers.json.kept": "mine too", "deep/er": "and mine"})
        return exchanged(new, target)

    monkeypatch.setattr(folders, "exchange", exchange)
    make(out, NEW)
    assert content(out) == {
        **NEW, "note.txt": "mine", "numbers.json.kept": "mine too", "deep/er": "and mine",
    }  # fmt: skip


# -- disks that are full, or not to be written to --------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB. Skipped, visibly, where we may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_in_one_sentence(small_disk):
    make(small_disk / "out", OLD)
    with open_run(small_disk / "run", "evaluation") as run:
        run.write_text("a", "1")
    big = "x" * 300_000

    def at_once():
        make(small_disk / "out", {"big": big})

    def one_file():
        write_text(small_disk / "out" / "numbers.json", big)

    def in_a_run():
        with open_run(small_disk / "run", "evaluation") as run:
            run.write_text("a", big)

    def by_safetensors():
        import torch
        from safetensors.torch import save_file

        with whole_file(small_disk / "tensors") as new:
            save_file({"a": torch.zeros(300_000)}, new)

    for work in (at_once, one_file, in_a_run, by_safetensors):
        with pytest.raises(OSError, match="cannot be written: the disk is full"):
            work()
    assert content(small_disk / "out") == OLD and content(small_disk / "run") == {"a": "1"}
    assert not leftovers(small_disk, small_disk / "run", small_disk / "out")
    make(small_disk / "out", NEW)
    assert content(small_disk / "out") == NEW


def test_the_top_of_a_mounted_disk_can_be_the_folder(small_disk):
    for files in (OLD, NEW):
        make(small_disk, files)
        assert content(small_disk) == files and not leftovers(small_disk, small_disk.parent)


def test_a_read_only_disk_is_told_in_one_sentence(small_disk):
    make(small_disk / "out", OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for work in (
        lambda: make(small_disk / "out", NEW),
        lambda: make(small_disk / "new", NEW),
        lambda: write_text(small_disk / "out" / "numbers.json", ""),
        lambda: open_run(small_disk / "run", "evaluation").__enter__(),
    ):
        with pytest.raises(
            (OSError, ValueError), match=r"cannot be written: .*(read-only|not writable)"
        ):
            work()
    assert content(small_disk / "out") == OLD


# -- folders that grow -----------------------------------------------------------------------------

ASKED = {"pairs": 3, "layers": ["a", "b"]}


def test_a_run_goes_on_with_the_same_settings_only(tmp_path):
    out = tmp_path / "run"
    with open_run(out, "evaluation", ASKED) as run:
        assert run.fresh
        run.write_text("parts/0", "zero")
    (out / "note.txt").write_text("mine")
    with open_run(out, "evaluation", {**ASKED, "layers": ("a", "b")}) as run:
        assert not run.fresh and run.names == ["parts/0"] and run.whole("parts/0")
        assert not run.whole("parts/1")
    with (
        pytest.raises(ValueError, match=r"of other settings \(pairs: 3 there, 4 now\)"),
        open_run(out, "evaluation", {**ASKED, "pairs": 4}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"holds other files \('note.txt'\)"),
        open_run(out, "evaluation", None, overwrite=True),
    ):
        pass
    assert content(out) == {"parts/0": "zero", "note.txt": "mine"}
    (out / "note.txt").unlink()
    with open_run(out, "evaluation", None, overwrite=True) as run:
        assert run.fresh and not (out / "parts").exists()
        run.write_text("a", "1")
    with open_run(out, "evaluation") as run:
        assert run.names == ["a"]


def test_damaged_files_of_a_run_are_known(tmp_path):
    out = tmp_path / "run"
    with open_run(out, "evaluation") as run:
        for name in "abcd":
            run.write_text(name, "as it was")
    (out / "a").write_text("as it wos")
    (out / "b").write_text("as it")
    (out / "c").unlink()
    with open_run(out, "evaluation") as run:
        assert [name for name in "abcd" if run.whole(name)] == ["d"]


def test_somebody_elses_file_is_not_written_over(tmp_path):
    out = tmp_path / "run"
    with open_run(out, "evaluation") as run:
        run.write_text("a", "1")
        (out / "results.json").write_text("mine")
        (out / "parts").write_text("mine")
        for name in ("results.json", "parts/0"):
            with pytest.raises(ValueError, match="where results have to go"):
                run.write_text(name, "2")
        with pytest.raises(ValueError, match="where results have to go"):
            run.child("parts")
        run.write_text("a", "3")
    assert content(out) == {"a": "3", "results.json": "mine", "parts": "mine"}


@pytest.mark.parametrize("name", ["../a", "/a", "", ".", "a/../b", "a//b", MARKER, "a\0"])
def test_names_stay_inside(tmp_path, name):
    with open_run(tmp_path / "run", "evaluation") as run:
        run.write_text("kept", "")
        with pytest.raises(ValueError, match=r"no name of a file inside|cannot be the name"):
            run.write_text(name, "x")


def test_folders_inside_have_markers_of_their_own(tmp_path):
    out = tmp_path / "run"
    with open_run(out, "study") as run:
        with open_run(run.child("passes"), "passes") as inner:
            inner.write_text("size/t1", "x")
        make(run.child("test-0"), OLD)
    (out / "test-0" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \('test-0/note.txt'\)"):
        check_folder(out, "study")
    check_folder(out, "study", grows=True)
    with open_run(out, "study") as run:
        run.discard_children()
        run.write_text("a", "1")
    assert content(out) == {"a": "1", "test-0/note.txt": "mine"}


def test_a_line_that_was_never_finished_does_not_count(tmp_path):
    out = tmp_path / "run"
    with open_run(out, "evaluation", ASKED) as run:
        run.write_text("a", "1")
    whole = (out / MARKER).read_bytes()
    for torn in (b'{"commit": "", "fil', b"\x00\x00", b'{"gone": ["a"]}'):
        (out / MARKER).write_bytes(whole + torn)
        with open_run(out, "evaluation", ASKED) as run:
            assert run.names == ["a"]
        assert (out / MARKER).read_bytes() == whole
    other = tmp_path / "begun"  # its process died while it wrote the first line
    other.mkdir()
    for torn in (b"", b'{"form', b'{"format": "flashmaps folder 1", "ki'):
        (other / MARKER).write_bytes(torn)
        with open_run(other, "evaluation", ASKED) as run:
            assert run.fresh
            run.write_text("a", "1")
        shutil.rmtree(other)
        other.mkdir()
        (other / MARKER).write_bytes(torn)
        make(other, NEW)
        assert content(other) == NEW
        shutil.rmtree(other)
        other.mkdir()


def test_discarding_takes_only_what_is_ours(tmp_path):
    out = tmp_path / "out"
    make(out, OLD)
    discard(out)
    assert not out.exists()
    discard(out)
    make(out, OLD)
    (out / "pictures" / "note.txt").write_text("mine")
    discard(out)
    assert content(out) == {"pictures/note.txt": "mine"}
    discard(out)
    assert content(out) == {"pictures/note.txt": "mine"}


def test_a_run_that_lost_its_files_stays_ours_when_it_fails(tmp_path):
    """Found by the attack: the marker went, and the next run was refused for the note."""
    out = tmp_path / "run"
    with open_run(out, "evaluation") as run:
        run.write_text("a", "1")
    (out / "note.txt").write_text("mine")
    with open_run(out, "evaluation") as run:
        run.remove(["a"])
    with pytest.raises(RuntimeError), open_run(out, "evaluation"):
        raise RuntimeError
    with open_run(out, "evaluation") as run:
        run.write_text("a", "2")
    assert content(out) == {"a": "2", "note.txt": "mine"}
