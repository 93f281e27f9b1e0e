"""What FlashMaps writes: files and folders that are whole, or as they were, whatever happens.

Three ways in, for everything that writes:

    with whole_file("picture.png") as new: ...        # one file
    with whole_folder("out", "match") as new: ...     # a folder, made anew each time
    with open_run("out", "batch", asked) as run:      # it grows, and goes on after a kill
        with run.file("parts/000000.parquet") as new: ...
        with run.files() as new: ...                  # several that belong together

A folder is ours by what its marker says (:mod:`flashmaps.files.marker`): its kind, and every file
that was written. Only those are replaced. Anything else in it is a refusal that names it, except in
a run that goes on, where it is left alone. A command calls ``check_folder`` first thing, or has
``whole_folder`` around all of its work: it is refused before the work, and nothing changes before
the work is done. Two writers of one folder at once: the second is refused.

What is written replaces what was there in one step, after it is safe on the disk; what a dead
process has left is cleared, or finished, by the next one that writes there. Output folders that are
symbolic links stay links. Errors say in one sentence what is wrong: ValueError for what somebody
has to choose otherwise, OSError for a disk that is full, not writable or broken.

This is the bottom room: it imports nothing of flashmaps.
"""

from .folders import check_folder, whole_folder
from .marker import MARKER, adopt, discard
from .runs import Run, open_run
from .single import whole_file, write_json, write_text

__all__ = [
    "MARKER",
    "Run",
    "adopt",
    "check_folder",
    "discard",
    "open_run",
    "whole_file",
    "whole_folder",
    "write_json",
    "write_text",
]
