"""Features as files: what is loaded is what was saved, to the bit; folders; records."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from flashmaps.diffusion.entry import Entry
from flashmaps.diffusion.feature_folder import FeatureFolder
from flashmaps.diffusion.features import Features
from flashmaps.diffusion.record import Record
from flashmaps.matching.pairs import match_pairs
from test_pairs import random_features

pytestmark = pytest.mark.usefixtures("one_thread")


def alike(one: Features, other: Features) -> bool:
    for each in fields(Features):
        a, b = getattr(one, each.name), getattr(other, each.name)
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


def pictured(seed: int, exact: bool) -> Features:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (40, 50, 3)).astype(np.float32) / 255
    return replace(random_features(seed), image=image if exact else image * np.float32(0.999))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("more", [{}, {"output": None}, {"timestep": (1, 21), "seeds": ()}])
def test_what_is_loaded_is_what_was_saved(tmp_path, exact, more):
    one = replace(pictured(1, exact), inversion_steps=50 if more else None, **more)
    path = one.save(tmp_path / "one.safetensors")
    assert alike(Features.load(path), one)
    # Bytes for an image of bytes, else floats: and nothing that unpickles.
    assert path.stat().st_size < one.nbytes + 4000
    assert path.read_bytes()[:1] != b"\x80"


def test_parts_and_precisions_are_a_choice(tmp_path):
    one = pictured(2, True)
    small = tmp_path / "small.safetensors"
    one.save(small, image=False, dtype=torch.float16)
    found = Features.load(small)
    assert found.key.dtype == torch.float16 and torch.equal(found.key, one.key.half())
    assert found.head_weights.dtype == torch.float32  # they sum to 1
    assert found.image.shape == one.image.shape and found.nbytes < one.nbytes / 2
    assert torch.equal(Features.load(small, dtype=torch.float32).key, one.key.half().float())
    one.save(small, only=["key"])
    found = Features.load(small)
    assert found.query.shape == (1, 3, 0, 8) and torch.equal(found.key, one.key)
    assert Features.load(small, only=["query"]).key.shape == (1, 3, 0, 8)


def test_a_folder_is_a_sequence_that_reads_when_asked(tmp_path):
    sets = [pictured(seed, True) for seed in range(4)]
    for number, each in enumerate(sets):
        each.save(tmp_path / f"{number}.safetensors")
    folder = FeatureFolder(tmp_path)
    assert len(folder) == 4 and alike(folder[2], sets[2]) and len(folder[1:3]) == 2
    (given,) = match_pairs(sets)
    (read,) = match_pairs(folder, order="given")
    assert torch.equal(given.trip.forward, read.trip.forward)
    assert torch.equal(given.trip.soft_ims, read.trip.soft_ims)
    with pytest.raises(ValueError, match="is no folder of features"):
        FeatureFolder(tmp_path / "not there")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*.safetensors"):
        FeatureFolder(tmp_path / "empty")


def entry(seed: int, layer: str, batch: int = 1) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, 3, 20, 8, generator=generator)
    return Entry(layer, 0, "self", query, key, 8**-0.5, grid=(4, 5), _timestep=1)


def test_records_are_features(tmp_path):
    record = Record([entry(0, "a"), entry(1, "b")])
    made = Features.from_record(record)
    assert made.layers == ("a", "b") and made.key.shape == (1, 6, 20, 8) and made.timestep == 1
    assert torch.equal(made.key[:, 3:], record[1].key)
    dense = (
        torch.softmax(made.scale * made.query @ made.key.mT, -1) * made.head_weights[:, None, None]
    ).sum(1)
    torch.testing.assert_close(record.map().to_dense(), dense)
    record.save(tmp_path / "0.safetensors")
    Record([entry(2, "a"), entry(3, "b")]).save(tmp_path / "1.safetensors")
    (of_files,) = match_pairs(FeatureFolder(tmp_path))
    (of_records,) = match_pairs([record, Record([entry(2, "a"), entry(3, "b")])])
    assert torch.equal(of_files.trip.forward, of_records.trip.forward)
    two = Record([entry(4, "a", batch=2)])
    assert torch.equal(Features.from_record(two, row=1).key, two[0].key[1:])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Features.load(tmp_path / "x.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Features.load(other)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="holds no features that flashmaps"):
        Features.load(other)
    with pytest.raises(ValueError, match="wanted a floating point dtype"):
        pictured(0, True).save(tmp_path / "y.safetensors", dtype=torch.int8)
    assert not (tmp_path / "y.safetensors").exists()
    with pytest.raises(ValueError, match="holds no entries"):
        Features.from_record(Record())
    with pytest.raises(ValueError, match="row=1; the record's batch holds 1"):
        Features.from_record(Record([entry(0, "a")]), row=1)
    with pytest.raises(ValueError, match="holds statistics only"):
        Features.from_record(Record([replace(entry(0, "a"), query=None, key=None)]))
