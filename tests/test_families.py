"""Families whose layers are known: each label is proven with a small model of random weights."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from family_table import MODELS, with_table
from flashmaps.diffusion.capture import capture
from flashmaps.diffusion.families import FAMILIES
from tiny_families import CASES, HEIGHT, WIDTH

pytestmark = pytest.mark.usefixtures("one_thread")


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.model)


EACH = each(CASES)
# Convolutions carry a change further; and some models must be square.
PLACED = each([case for case in CASES if case.place is not None])
# Modules that add what a token has seen to it: without them tokens keep to themselves.
_MIXES = {"to_out", "to_add_out", "to_out_t", "out_layer", "proj_out"}


def run(model, inputs):
    with torch.no_grad(), capture(model, keep="qk") as record:
        out = model(**inputs, return_dict=False)
    return first(out), record


def first(out):
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out


def secluded(case):
    """The model, changed so that no token learns of another: its attention's output is zero."""
    model = case.build()
    for name, module in model.named_modules():
        names = [part for part in name.split(".") if not part.isdigit()]
        of_layer = any(part.endswith(("blocks", "layers", "refiner")) for part in names)
        mixes = names and names[-1] in _MIXES and (of_layer or "attention" in name)
        if isinstance(module, torch.nn.Linear) and (mixes or name in case.mute):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return model


def told(entry):
    """The parts of an entry as they are written in the table."""
    sides = [
        " + ".join(sorted(parts, key=lambda name: parts[name].start))
        for parts in (entry.queries, entry.keys)
    ]
    return sides[0] if entry.queries == entry.keys else " -> ".join(sides)


def wanted(case, layer):
    return next(order for name, order in case.layers.items() if fnmatch.fnmatchcase(layer, name))


def rows_that_differ(one, other):
    """Which tokens, of any batch row and head."""
    return set((one != other).any(-1).flatten(0, 1).any(0).nonzero().flatten().tolist())


def known(before, after):
    return [pair for pair in zip(before, after, strict=True) if pair[0].kind != "unknown"]


def tokens(parts, names):
    return {at for name in names if name in parts for at in range(*parts[name].indices(10**6))}


def changed(case, name):
    """The inputs with others in place of ``name``, of the same shape."""
    inputs = case.inputs()
    old = inputs[name]
    if isinstance(old, list):
        inputs[name] = [x.flip(-1) + 1 for x in old]
    else:
        inputs[name] = old + 1 if not old.is_floating_point() else old.flip(-1) + 1
    return inputs


@EACH
def test_output_is_identical_and_layers_are_what_the_table_says(case):
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        plain = first(model(**case.inputs(), return_dict=False))
    out, record = run(model, inputs)
    assert torch.equal(plain, out)
    assert len(record) > 0
    for entry in record:
        assert told(entry) == wanted(case, entry.layer), entry
        assert (entry.why == "") == (entry.kind != "unknown") == bool(told(entry))
        if "image" in entry.queries:
            part = entry.queries["image"]
            height, width = entry.grid
            assert part.stop - part.start == entry.frames * height * width
            assert (entry.frames, entry.rows) == (case.frames, case.rows)
        else:
            assert entry.grid is None
    assert {each for each in case.layers if any(fnmatch.filter(record.layers, each))} == set(
        case.layers
    )


@EACH
def test_changing_only_the_text_changes_exactly_what_is_called_text(case):
    """And changing only the latents exactly what is called image."""
    model = secluded(case)
    _, before = run(model, case.inputs())
    for name, parts in case.text.items():
        _, after = run(model, changed(case, name))
        found = set()
        for one, other in known(before, after):
            for side in ("queries", "keys"):
                x, y = (
                    getattr(each, {"queries": "query", "keys": "key"}[side])
                    for each in (one, other)
                )
                differ = rows_that_differ(x, y)
                expected = tokens(getattr(one, side), parts)
                if len(case.text) > 1:  # one of several texts: some of the rows
                    assert differ <= expected
                else:
                    assert differ == expected, (one, side)
                found |= differ
        assert found
    _, after = run(model, changed(case, case.latents))
    for one, other in known(before, after):
        images = ("image", "reference", "frames")
        assert rows_that_differ(one.query, other.query) == tokens(one.queries, images), one
        assert rows_that_differ(one.key, other.key) == tokens(one.keys, images), one


@PLACED
def test_the_grid_is_where_tokens_lie(case):
    """A change at one place of the latents changes the one token that the grid has there."""
    model = secluded(case)
    _, before = run(model, case.inputs())
    frame, row, column = case.frames - 1, HEIGHT - 2, 1
    inputs = case.inputs()
    latents = inputs[case.latents]
    at = case.place(frame, row, column)
    for each in latents if isinstance(latents, list) else [latents]:
        each[at] += 1
    _, after = run(model, inputs)
    seen = 0
    for one, other in known(before, after):
        if "image" not in one.queries or one.layer.startswith("transformer_blocks.1"):
            continue
        assert one.grid == (HEIGHT, WIDTH)
        start = one.queries["image"].start + (frame * HEIGHT + row) * WIDTH + column
        assert rows_that_differ(one.query, other.query) == {start}, one
        seen += 1
    assert seen


def test_every_model_that_is_listed_is_proven():
    listed = {(family.name, name) for family in FAMILIES for name in family.models}
    assert listed == {(case.family, case.model) for case in CASES}


def test_the_documentation_has_this_table():
    """``python tests/family_table.py`` writes it."""
    assert MODELS.read_text("utf-8") == with_table(MODELS.read_text("utf-8"))
