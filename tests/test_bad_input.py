"""Bad input, one line each: what is done, and the words that the error must say.

Errors name the argument, what it was and what is wanted; none is a traceback of internals, and none
leaves anything behind.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import flashmaps as fm
import numpy as np
import pytest
import torch
from flashmaps.app.commands import make_app
from flashmaps.diffusion.features import Features, features
from flashmaps.diffusion.images import fit_size, load_image
from flashmaps.diffusion.loading import load_model
from flashmaps.files import check_folder, write_json
from flashmaps.matching.settings import FILE, MatchSettings, settings_of
from flashmaps.parts.result import Parts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
MATCH = "match {photo} {photo} --model {tiny} --size 64"
EVAL = "eval world --pairs 1 --points 4 --model {tiny} --size 64"
STUDY = "study --model {tiny}"
BATCH = "batch {photo} {room}/other.png --model {tiny} --size 64"
SEGMENT = "segment {photo} --model {tiny}"
PARTS = "parts {photo} {photo} --model {tiny}"

# A command line, and the words.
COMMANDS = [
    ("match", "Missing argument 'source'"),
    ("match {photo}", "Missing argument 'target'"),
    ("match nowhere.png {photo}", "SOURCE: there is no file 'nowhere.png'"),
    ("match {photo} nowhere.png", "TARGET: there is no file 'nowhere.png'"),
    ("match {room} {photo}", "wanted an image file"),
    ("match {room}/small.png {photo}", "SOURCE is 8 x 8 pixels"),
    (
        "match {room}/text.png {photo}",
        "is not an image that Pillow can read (PNG, JPEG, WebP, TIFF",
    ),
    (
        "match {room}/empty.png {photo}",
        "is not an image that Pillow can read (PNG, JPEG, WebP, TIFF",
    ),
    ("match {room}/pipe.png {photo}", "is no ordinary file"),
    ("match /dev/zero {photo}", "SOURCE: '/dev/zero' is no ordinary file"),
    ("match /dev/null {photo}", "SOURCE: '/dev/null' is no ordinary file"),
    ("match {room}/cut.png {photo}", "cannot be read: image file is truncated"),
    ("match {room}/loop {photo}", "SOURCE: there is no file"),
    (
        "match {room}/{red}.png {photo}",
        "is not an image that Pillow can read (PNG, JPEG, WebP, TIFF",
    ),
    (
        "match {room}/[bold]x[/x].png {photo}",
        "is not an image that Pillow can read (PNG, JPEG, WebP, TIFF",
    ),
    ("match {nul} {photo}", "Invalid value for 'source'"),
    ("match {long} {photo}", "cannot be read: File name too long"),
    ("match '' {photo}", "SOURCE: '.' is a folder"),
    ("match {photo} {photo} --size -1", "both sides must be at least one pixel"),
    ("match {photo} {photo} --size 0", "both sides must be at least one pixel"),
    ("match {photo} {photo} --size 1", "size=1 is too small"),
    (
        "match {photo} {photo} --size 1000000",
        "size=1000000 is more than a model is shown: at most 16384 pixels a side, and",
    ),
    ("match {photo} {photo} --size {digits}", "is more than a model is shown: at most 16384"),
    ("match {photo} {photo} --size big", "Invalid value for '--size'"),
    ("match {photo} {photo} --size 1.5", "Invalid value for '--size'"),
    ("match {photo} {photo} --size ''", "Invalid value for '--size'"),
    ("{match} --timestep -1", "timestep=-1 is out of range"),
    ("{match} --timestep 1000", "timestep=1000 is out of range"),
    ("{match} --timestep x", "Invalid value for '--timestep'"),
    ("{match} --seed -1", "seeds=-1 is out of range"),
    (
        "{match} --seed 1000000000000000000000000000000",
        "seeds=1000000000000000000000000000000 is out of range",
    ),
    ("{match} --layers x", "layers='x' matches no attention layer of UNet2DConditionModel"),
    ("{match} --layers ''", "layers='' matches no attention layer of UNet2DConditionModel"),
    ("{match} --compare kv", "compare='kv' is not known"),
    ("{match} --backend fast", "backend 'fast' is unknown"),
    ("{match} --backend cuda", "backend 'cuda' cannot run this"),
    ("{match} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    ("{match} --out {photo}", "give a folder to write to"),
    ("{match} --out {photo}/in", "which is a file"),
    ("{match} --out {room}/pipe.png", "give a folder to write to"),
    ("{match} --out /dev/null", "'/dev/null' is a file"),
    ("{match} --out /proc/x", "'/proc/x' cannot be written: its place is gone, or takes no files"),
    ("{match} --out {room}/loop", "give a folder to write to"),
    ("{match} --out {long}", "cannot be written: a name in it is too long"),
    (
        "{match} --out {tiny}",
        "holds other files ('model_index.json', 'scheduler/', 'text_encoder/',",
    ),
    ("{match} --nonsense", "No such option: --nonsense"),
    ("match {photo} {photo} --model ./nowhere", "model='./nowhere': there is no such folder"),
    (
        "match {photo} {photo} --model {photo}",
        "wanted a diffusers folder. Convert a single-file checkpoint with",
    ),
    (
        "match {photo} {photo} --model {room}/nomodel",
        "has no model_index.json, so it is not a diffusers pipeline",
    ),
    (
        "match {photo} {photo} --model owner/name",
        "hub model 'owner/name' could not be loaded: it is not on this machine, and",
    ),
    (
        "match {photo} {photo} --model ''",
        "model folder '.' has no model_index.json, so it is not a diffusers pipeline",
    ),
    ("match {photo} {photo} --model 'a b'", "model='a b': there is no such folder"),
    ("match {photo} {photo} --model ../x", "model='../x': there is no such folder"),
    (
        "match {photo} {photo} --model 'own er/na me'",
        "model='own er/na me': there is no such folder",
    ),
    ("eval", "Missing argument 'benchmark'"),
    ("eval nonsense", "benchmark 'nonsense' is not known"),
    ("eval world --pairs 0", "pairs must be a whole number from 1 to 10000000, got 0"),
    ("eval world --pairs -3", "pairs must be a whole number from 1 to 10000000, got -3"),
    ("eval world --pairs x", "Invalid value for '--pairs'"),
    ("eval world --points 0", "points must be a whole number from 1 to 10000000, got 0"),
    ("eval world --seed -1", "seed must be a whole number >= 0, got -1"),
    ("eval world --split train", "world is scored on its splits 'test' and 'validation'"),
    ("eval world --split x", "world is scored on its splits 'test' and 'validation'"),
    ("eval world --image-size 3", "image_size must be a whole number from 16 to 1024, got 3"),
    (
        "eval world --image-size 1000000",
        "image_size must be a whole number from 16 to 1024, got 1000000",
    ),
    ("eval stereo --pairs 2", "pairs=2: stereo is a single pair"),
    ("eval stereo --image-size 64", "image_size=64: only world draws its images at any size"),
    ("eval world --data x", "data='x': world needs no folder"),
    ("eval spair", "data is missing: spair needs the folder of SPair-71k as it is published: the"),
    ("eval spair --data /nowhere", "data: there is no folder '/nowhere'"),
    ("eval spair --data {room}", "data: the folder"),
    ("eval cub --data {room}", "data: the folder"),
    ("eval pf-pascal --data {room}", "data: the folder"),
    ("eval pf-willow --data {room}", "data: the folder"),
    ("eval spair --points 5 --data {room}", "points=5: SPair-71k has points of its own"),
    ("{eval} --size -1", "both sides must be at least one pixel"),
    ("eval world --pairs 1 --model {tiny} --size -1", "both sides must be at least one pixel"),
    ("{eval} --resamples 0", "resamples must be a whole number from 1 to 1000000, got 0"),
    ("{eval} --resamples -1", "resamples must be a whole number from 1 to 1000000, got -1"),
    (
        "{eval} --resamples 1000000000000",
        "resamples must be a whole number from 1 to 1000000, got 1000000000000",
    ),
    ("{eval} --timestep 1000", "timestep=1000 is out of range"),
    ("{eval} --noise-seed -1", "seeds=-1 is out of range"),
    ("{eval} --layers x", "layers='x' matches no attention layer of UNet2DConditionModel"),
    ("{eval} --compare kv", "compare='kv' is not known"),
    ("{eval} --dtype half", "dtype='half' is not known"),
    ("{eval} --device cuda:99", "device='cuda:99' cannot be used here"),
    ("{eval} --device nonsense", "device='nonsense' is not known"),
    ("{eval} --device meta", "device='meta' computes nothing"),
    ("{eval} --backend x", "backend 'x' is unknown"),
    ("{eval} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    ("{eval} --out {photo}", "give a folder to write to"),
    ("{study} --pairs 0", "pairs must be a whole number from 1 to 10000000, got 0"),
    ("{study} --points 0", "points must be a whole number from 1 to 10000000, got 0"),
    ("{study} --test-pairs 0", "test_pairs must be a whole number from 1 to 10000000, got 0"),
    ("{study} --seed -1", "seed must be a whole number >= 0, got -1"),
    ("{study} --compare x", "compare='x' is not known"),
    ("{study} --timestep 1000", "timestep=1000 is out of range"),
    ("{study} --timestep -1", "timestep=-1 is out of range"),
    ("{study} --size -1", "both sides must be at least one pixel"),
    ("{study} --size 0", "both sides must be at least one pixel"),
    ("{study} --noises 0", "noises must be a whole number from 1 to 64, got 0"),
    ("{study} --noises 1000", "noises must be a whole number from 1 to 64, got 1000"),
    ("{study} --device cuda:99", "device='cuda:99' cannot be used here"),
    ("{study} --model ./nowhere", "model='./nowhere': there is no such folder"),
    ("{study} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    (
        "match {photo} {photo} --model {tiny} --size 64 --prompt cat\ud800",
        "prompt='cat\\ud800' is no Unicode text: '\\ud800' is half a character",
    ),
    ("batch", "give a folder of images, or several image files"),
    ("batch {photo} --model {tiny}", "pairs='all' needs at least 2 images, there are 1"),
    ("batch {photo} nowhere.png", "there is no image file 'nowhere.png'"),
    ("{batch} --memory-budget 0", "memory_budget must be a whole number >= 1, got 0"),
    ("{batch} --memory-budget -5", "memory_budget must be a whole number >= 1, got -5000000"),
    ("{batch} --pairs x", "wanted all, nearest, chain, star, or a .csv or .parquet file"),
    ("{batch} --pairs nearest --number 0", "number=0; pairs='nearest' needs at least 1"),
    ("{batch} --rows x", "rows='x'; wanted tokens, points, pairs"),
    ("{batch} --stage x", "stage='x'; wanted 'features' or 'pairs'"),
    ("{batch} --dtype int8", "dtype='int8' is not known; wanted float32, float16, bfloat16"),
    ("{batch} --device cuda:99", "device='cuda:99' cannot be used here"),
    ("{batch} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    ("segment", "Missing argument 'images'"),
    ("segment nowhere.png", "image 'nowhere.png': there is no file 'nowhere.png'"),
    ("segment {room}/small.png --model {tiny}", "is 8 x 8 pixels"),
    ("{segment} --count 0", "count must be a whole number >= 1, got 0"),
    ("{segment} --count x", "Invalid value for '--count'"),
    ("{segment} --layers nothing", "matches no attention layer of UNet2DConditionModel"),
    ("{segment} --timestep 5000", "timestep=5000 is out of range; it takes 0 to 999"),
    ("{segment} --size 3", "size=3 is too small; this model needs at least 16 pixels"),
    ("{segment} --backend x", "backend 'x' is unknown"),
    ("{segment} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not"),
    ("cosegment {photo} --model {tiny}", "a collection has two images at least, got 1"),
    ("cosegment {photo} nowhere.png --model {tiny}", "there is no file 'nowhere.png'"),
    ("cosegment {photo} {photo} --model {tiny} --count -1", "count must be a whole number >= 1"),
    ("eval segments --split train", "world is scored on its splits 'test' and 'validation'"),
    ("eval segments --pairs 0", "count must be a whole number >= 1, got 0"),
    ("eval segments --image-size 0", "size must be a whole number from 16 to 1024, got 0"),
    ("eval segments --points 0", "--points: not an option of eval segments"),
    ("eval segments --layers x", "--layers: not an option of eval segments"),
    ("eval segments --resamples 0", "resamples must be a whole number from 1 to 1000000, got 0"),
    ("eval segments --seed -1", "seed must be a whole number >= 0, got -1"),
    ("eval cosegments --resamples 0", "resamples must be a whole number from 1 to 1000000"),
    ("eval cosegments --pairs 0", "pairs must be a whole number >= 1, got 0"),
    ("eval cosegments --pairs -1", "pairs must be a whole number >= 1, got -1"),
    ("parts", "Missing argument 'images'"),
    ("parts {photo} --model {tiny}", "images must be a list of two images of one kind, at least"),
    ("parts {photo} nowhere.png --model {tiny}", "image 1: there is no file 'nowhere.png'"),
    ("{parts} --loss x", "loss='x' is not known; choose from noise, attention, both"),
    ("{parts} --steps 0", "steps must be a whole number >= 1, got 0"),
    ("{parts} --batch -1", "batch must be a whole number >= 1, got -1"),
    ("{parts} --tokens 0", "tokens must be a whole number >= 1, got 0"),
    ("{parts} --seed -1", "seed must be a whole number >= 0, got -1"),
    ("{parts} --size 3", "size=3 is too small; this model needs at least 16 pixels"),
    ("{parts} --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    ("eval parts --pairs 0", "pairs must be a whole number from 1 to 12, got 0"),
    ("eval parts --images 1", "images must be a whole number >= 2, got 1"),
    ("eval parts --image-size 0", "size must be a whole number from 16 to 1024, got 0"),
    ("eval parts --split train", "split='train'; wanted 'test', or 'validation' to choose on"),
    ("eval parts --resamples 0", "resamples must be a whole number from 1 to 1000000, got 0"),
    ("eval parts --layers x", "--layers: not an option of eval parts"),
    ("eval parts --labels {room}", "--labels: not an option of eval parts"),
    ("world --out x.jpg", "--out 'x.jpg' must end in .png"),
    ("world --out {room}", "must end in .png"),
    ("world --out {room}/no/x.png", "cannot be written: there is no such folder to put it in"),
    ("world --size 0", "size must be a whole number from 16 to 1024, got 0"),
    ("world --size -1", "size must be a whole number from 16 to 1024, got -1"),
    (
        "world --size 1000",
        "24 scenes and 12 pairs of 1000 pixels make a sheet of 8106 x 18268",
    ),
    ("world --count 0", "count must be a whole number >= 1, got 0"),
    ("world --count -1", "count must be a whole number >= 1, got -1"),
    (
        "world --count 100000000",
        "100000000 scenes and 12 pairs of 128 pixels make a sheet of 1130 x 8837500451",
    ),
    (
        f"world --pairs 1{400 * '0'}",
        "--pairs must be a whole number from 0 to 9223372036854775807, got one of 1329 bits",
    ),
    (f"world --count 1{400 * '0'}", "count must be a whole number from 1 to 9223372036854775807"),
    (f"world --seed 1{400 * '0'}", "seed must be a whole number <= 9223372036854775807"),
    ("world --pairs -1", "--pairs must be a whole number >= 0, got -1"),
    (
        "world --pairs 100000000",
        "24 scenes and 100000000 pairs of 128 pixels make a sheet of 1130 x 3725002125",
    ),
    ("world --split x", "there is no split 'x'"),
    ("world --category unicorn", "categories: there is no 'unicorn'"),
    ("world --seed x", "Invalid value for '--seed'"),
    ("world --out /dev/null", "--out '/dev/null' must end in .png"),
    ("complete", "Missing argument 'image'"),
    ("complete {photo}", "Missing argument 'parts'"),
    ("complete {photo} {room}/nowhere", "holds no parts: there is no parts.json"),
    ("complete {photo} {room}/taken", "holds no parts: there is no parts.json"),
    ("complete {photo} {room} --samples x", "Invalid value for '--samples'"),
    ("complete {photo} {room} --out {room}/taken", "holds other files ('a.txt'), which flashmaps"),
    ("eval completion --split train", "world is scored on its splits 'test' and 'validation'"),
    ("eval completion --pairs 0", "pairs must be a whole number >= 1, got 0"),
    ("eval completion --images 1", "images must be a whole number >= 2, got 1"),
    ("eval completion --image-size 0", "size must be a whole number from 16 to 1024, got 0"),
    ("eval completion --points 4", "--points: not an option of eval completion"),
    ("eval completion --labels x", "--labels: not an option of eval completion"),
    ("eval completion --resamples 0", "resamples must be a whole number from 1 to 1000000"),
    ("eval completion --data {room}/nowhere", "data: there is no folder"),
    ("eval completion --data {room}", "is in none of the layouts that are known"),
    ("demo --out {room}/taken", "holds other files ('a.txt'), which flashmaps has not written"),
    ("demo --size -1", "both sides must be at least one pixel"),
    ("demo --size 0", "both sides must be at least one pixel"),
    ("demo --compare x", "compare='x' is not known"),
    ("demo --backend x", "backend 'x' is unknown"),
    ("demo --model ./nowhere", "model='./nowhere': there is no such folder"),
    ("demo --timestep 5000", "timestep=5000 is out of range"),
    ("demo --seed -2", "seeds=-2 is out of range"),
    ("demo --layers x", "layers='x' matches no attention layer of UNet2DConditionModel"),
    ("nonsense", "No such command 'nonsense'"),
]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Good and bad files, and a tiny model."""
    from PIL import Image

    place = tmp_path_factory.mktemp("room")
    tiny_pipeline(place / "tokenizer").save_pretrained(place / "tiny")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "photo.png")
    Image.fromarray(pixels[::-1]).save(place / "other.png")
    Image.new("RGB", (8, 8)).save(place / "small.png")
    (place / "cut.png").write_bytes((place / "photo.png").read_bytes()[:2000])
    (place / "[bold]x[").mkdir()
    for name, text in (
        ("text.png", "hello"), ("empty.png", ""), ("\x1b[31mred.png", "x"),
        ("[bold]x[/x].png", "x"),
    ):  # fmt: skip
        (place / name).write_text(text)
    os.mkfifo(place / "pipe.png")
    (place / "loop").symlink_to(place / "loop")
    for name in ("taken", "nomodel"):
        (place / name).mkdir()
    (place / "taken" / "a.txt").write_text("mine")
    return place


def filled(room, line, out):
    """The arguments of a line of the table, which writes to ``out`` unless it says where."""
    names = {
        "photo": room / "photo.png", "tiny": room / "tiny", "room": room, "long": "n" * 300,
        "digits": "1" + "0" * 400, "red": "\x1b[31mred", "nul": "a\0b",
    }  # fmt: skip
    for short, full in (
        ("{match}", MATCH), ("{eval}", EVAL), ("{study}", STUDY), ("{batch}", BATCH),
        ("{segment}", SEGMENT),
        ("{parts}", PARTS),
    ):  # fmt: skip
        line = line.replace(short, full)
    found = [word.format_map(names) for word in shlex.split(line)]
    return found if "--out" in found or found == ["nonsense"] else [*found, "--out", str(out)]


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_command_says_what_is_wrong(room, tmp_path, monkeypatch, line, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / ("out.png" if line.startswith("world") else "out")
    result = CliRunner().invoke(make_app(), filled(room, line, out))
    said = " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.exit_code == (1 if "backend cuda" in line else 2), said
    assert isinstance(result.exception, SystemExit), result.exception
    assert words in said
    assert "Traceback" not in said and "\x1b" not in said
    assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in (room / "taken").iterdir()) == ["a.txt"]


# -- the library -----------------------------------------------------------------------------------

Q, K = torch.ones(1, 2, 16, 8), torch.ones(1, 2, 16, 8)
SEVEN = torch.ones(1, 2, 7, 8)
NAN, INF = float("nan"), float("inf")
M = fm.AttentionMap
A, B = M(Q, K), M(torch.ones(1, 2, 9, 8), K)
SQUARE = np.zeros((32, 32, 3), np.float32)


def whole(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


# What is done, and the words.
CALLS = [
    (lambda: M([1], K), "query must be a torch.Tensor [B, H, N, d], got list"),
    (lambda: M(None, K), "query must be a torch.Tensor [B, H, N, d], got NoneType"),
    (lambda: M(Q, "k"), "key must be a torch.Tensor"),
    (lambda: M(Q.numpy(), K), "query must be a torch.Tensor [B, H, N, d], got ndarray"),
    (lambda: M(Q[0, 0], K), "query must have 4 dimensions [B, H, N, d], got 2"),
    (lambda: M(Q, K[0, 0, 0]), "key must have 4 dimensions"),
    (lambda: M(Q.int(), K.int()), "query has dtype torch.int32; wanted float64"),
    (lambda: M(Q.cfloat(), K.cfloat()), "query has dtype torch.complex64"),
    (lambda: M(Q, K.half()), "query is torch.float32 but key is torch.float16"),
    (lambda: M(Q, torch.ones(1, 3, 16, 8)), "query has H = 2 heads"),
    (lambda: M(Q, K[..., :4]), "query has head dimension d = 8 but key has 4"),
    (lambda: M(Q.expand(3, 2, 16, 8), K.expand(2, 2, 16, 8)), "query has batch 3 and key has"),
    (lambda: M(Q[:, :, :0], K), "query is empty: [1, 2, 0, 8] has no tokens"),
    (lambda: M(Q, K[:, :, :0]), "key is empty"),
    (lambda: M(Q[:0], K), "query is empty: [0, 2, 16, 8] has no batch"),
    (lambda: M(Q, K.to("meta")), "query is on cpu but key is on meta"),
    (lambda: M(Q, K, scale="1"), "scale must be a finite number, got '1'"),
    (lambda: M(Q, K, scale=NAN), "scale must be a finite number, got nan"),
    (lambda: M(Q, K, scale=INF), "scale must be a finite number, got inf"),
    (lambda: M(Q, K, scale=True), "scale must be a finite number, got True"),
    (lambda: M(Q, K, scale=10**400), "scale must be a finite number, got 1000"),
    (lambda: M(Q, K, key_mask=torch.ones(3, 3).bool()), "key_mask has shape [3, 3]; wanted"),
    (lambda: M(Q, K, key_mask=whole(1, 16)), "key_mask has dtype torch.int64; wanted bool"),
    (lambda: M(Q, K, key_mask=torch.zeros(1, 16).bool()), "key_mask hides every key of batch 0"),
    (lambda: M(Q, K, key_mask=[True] * 16), "key_mask must be a torch.Tensor, got list"),
    (lambda: M(Q, K, key_mask=torch.full((1, 16), NAN)), "key_mask has NaN or +inf"),
    (lambda: M(Q, K, key_mask=torch.full((1, 16), -INF)), "key_mask hides every key"),
    (lambda: M(Q, K, head_weights=torch.ones(3) / 3), "head_weights has shape [3]; wanted [H] ="),
    (lambda: M(Q, K, head_weights=torch.ones(2)), "head_weights sum to 2; they must sum to 1"),
    (lambda: M(Q, K, head_weights=torch.tensor([2.0, -1])), "head_weights must be >= 0"),
    (lambda: M(Q, K, head_weights=torch.tensor([NAN, 1])), "head_weights must be >= 0, got [nan"),
    (lambda: M(Q, K, head_weights="ab"), "head_weights must be [H] = [2] numbers, got 'ab'"),
    (lambda: M(Q, K, pairs=whole(2, 3)), "pairs must be [P, 2] (query index, key index)"),
    (lambda: M(Q, K, pairs=torch.zeros(2, 2)), "pairs must hold integers, got torch.float32"),
    (lambda: M(Q, K, pairs=torch.zeros(1, 2).bool()), "pairs must hold integers, got torch.bool"),
    (lambda: M(Q, K, pairs=torch.tensor([[0, 5]])), "pairs[:, 1] picks key 5, but the key batch"),
    (lambda: M(Q, K, pairs=torch.tensor([[0, -1]])), "pairs[:, 1] picks key -1"),
    (lambda: M(Q, K, pairs=whole(0, 2)), "pairs is empty"),
    (lambda: M(Q, K, pairs="ab"), "pairs must be [P, 2] integers"),
    (lambda: M(Q, K, normalize="cols"), "normalize = 'cols' is unknown; choose None or 'block'"),
    (lambda: M(Q, K, normalize=3), "normalize = 3 is unknown"),
    (lambda: M(Q, K, query_grid=(3, 4)), "query_grid = (3, 4) holds 12 tokens, but there are 16"),
    (lambda: M(Q, K, query_grid=(-4, -4)), "query_grid = (-4, -4) has a side below 1"),
    (lambda: M(Q, K, key_grid=(0, 16)), "key_grid = (0, 16) has a side below 1"),
    (lambda: M(Q, K, query_grid="44"), "query_grid must be (height, width) in whole numbers"),
    (lambda: M(Q, K, query_grid=(4.0, 4)), "query_grid must be (height, width) in whole numbers"),
    (lambda: M(Q, K, query_grid=(4, 4, 1)), "query_grid must be (height, width)"),
    (lambda: M(Q, K, query_grid=16), "query_grid must be (height, width) in whole numbers, got 16"),
    (lambda: M(Q, SEVEN).expectation(), "expectation needs key_grid: 7 tokens are not a square"),
    (lambda: M(Q, SEVEN, normalize="rows"), "normalize='rows' needs key_grid"),
    (lambda: M(Q, K, lse=torch.zeros(1, 2, 15)), "lse must be [batch, H, N] = [1, 2, 16]"),
    (lambda: M(Q, K, lse=whole(1, 2, 16)), "lse has dtype torch.int64; wanted a float"),
    (lambda: M(Q, K, lse=torch.full((1, 2, 16), NAN)), "lse has NaN or inf"),
    (lambda: M(Q, K, lse="x"), "lse must be [batch, H, N]"),
    (lambda: M(Q, K, backend="fast"), "backend 'fast' is unknown; choose 'auto' or one of cpu"),
    (lambda: M(Q, K, backend=None), "backend None is unknown"),
    (lambda: A.reduce("median"), "reduction 'median' is unknown; choose from entropy, max"),
    (lambda: A.reduce(), "reduce() needs at least one of entropy"),
    (lambda: A.reduce(3), "reduction 3 is unknown"),
    (lambda: B.reduce("diagonal"), "diagonal needs a square map, this one is 9 x 16"),
    (lambda: A.topk(0), "k must be a whole number >= 1, got 0"),
    (lambda: A.topk(17), "k = 17 is more than the 16 keys of the map"),
    (lambda: A.topk(2.0), "k must be a whole number >= 1, got 2.0"),
    (lambda: A.topk("2"), "k must be a whole number >= 1, got '2'"),
    (lambda: A.rows([16]), "row 16 is out of range: the map has 16 rows"),
    (lambda: A.rows([-17]), "row -17 is out of range"),
    (lambda: A.rows([1.5]), "rows(index) wants whole numbers in one dimension"),
    (lambda: A.pool(query_to=(5, 5)), "query_to = (5, 5) must lie between (1, 1) and the query"),
    (lambda: A.pool(key_to=(0, 1)), "key_to = (0, 1) must lie between"),
    (lambda: A.pool(query_to=(2.0, 2)), "query_to must be (height, width) in whole numbers"),
    (lambda: A.pool(query_to="22"), "query_to must be (height, width) in whole numbers, got '22'"),
    (lambda: M(SEVEN, K).pool(query_to=(2, 2)), "pool needs query_grid: 7 tokens"),
    (lambda: A @ torch.ones(1, 5, 3), "x has shape [1, 5, 3]; wanted [batch, tokens, C]"),
    (lambda: A @ torch.ones(16), "x has shape [16]; wanted [batch, tokens, C]"),
    (lambda: A @ whole(1, 16, 3), "x has dtype torch.int64; wanted a float"),
    (lambda: A @ "x", "x must be a torch.Tensor, got str"),
    (lambda: A.mT @ torch.ones(1, 5, 3), "y has shape [1, 5, 3]; wanted"),
    (lambda: A @ B, "do not chain: the first one's keys must be the second one's queries"),
    (lambda: fm.memory_budget("1G").__enter__(), "memory_budget must be a whole number of bytes"),
    (lambda: fm.compose(A, A, memory_budget=-1).entropy(), "memory_budget = -1 bytes is too small"),
    (lambda: fm.checks("yes"), "enabled must be True or False, got 'yes'"),
    (lambda: fm.round_trip(A, B), "A_ts has shape (1, 9, 16), but the way back from A_st"),
    (lambda: fm.round_trip(A, "x"), "A_ts must be an AttentionMap, got str"),
    (lambda: fm.inverse_mapping_score(A, A, kind="loud"), "kind = 'loud' is unknown"),
    (lambda: fm.compose(A, 3), "compose() takes two AttentionMaps, got AttentionMap and int"),
    (lambda: fm.nims("a", "b"), "entropy must be a torch.Tensor, got str"),
    (lambda: fm.nims(torch.ones(3), torch.ones(4)), "entropy [3] and density [4] do not go"),
    (lambda: fm.nims(whole(3), whole(3)), "entropy has dtype torch.int64; wanted a float"),
    (lambda: M.average([]), "average() needs at least one map"),
    (lambda: M.average([A, A], weights=[1, 1]), "weights must be >= 0 and sum to 1"),
    (lambda: load_image(3), "image is a int; wanted a path, a PIL image"),
    (lambda: load_image(np.zeros((4, 4, 2, 2))), "image has shape (4, 4, 2, 2); wanted"),
    (lambda: load_image(np.full((32, 32), NAN)), "image holds NaN or infinite values"),
    (lambda: load_image(np.full((32, 32), 7.0)), "wanted 0..1"),
    (lambda: load_image(np.zeros((8, 8))), "image is 8 x 8 pixels; both sides must be at least"),
    (lambda: fit_size(32, 32, (10**6, 64), 8), "is more than a model is shown: at most 16384"),
    (lambda: fit_size(32, 32, (16384, 16384), 8), "and 16777216 in all"),
    (lambda: fit_size(32, 32, (-5, 64), 8), "both sides must be at least one pixel"),
    (lambda: fit_size(32, 32, "64", 8), "size='64' must be a whole number of pixels"),
    (lambda: fit_size(32, 32, 64.0, 8), "size=64.0 must be a whole number of pixels"),
    (lambda: fm.match(SQUARE, SQUARE, compare="kv"), "compare='kv' is not known"),
    (
        lambda: fm.match(SQUARE, SQUARE, temperature=-1),
        "temperature must be a finite number >= 1e-12, got -1",
    ),
    (lambda: fm.match(SQUARE, SQUARE, readout="x"), "readout='x'"),
    (lambda: fm.match(SQUARE, SQUARE, window=0), "window"),
    (lambda: fm.match(SQUARE, SQUARE, between="x"), "between='x'"),
    (lambda: fm.match(SQUARE, SQUARE, normalize="x"), "normalize='x'"),
    (lambda: load_model(3), "model is a int"),
    (lambda: load_model(device="nonsense"), "device='nonsense' is not known; wanted cpu, cuda"),
    (lambda: load_model(device="cuda:99"), "device='cuda:99' cannot be used here"),
    (lambda: load_model(device="meta"), "device='meta' computes nothing"),
    (lambda: check_folder("a\0b", "match"), "cannot be a folder's name"),
    (lambda: check_folder("/dev/null", "match"), "is a file; give a folder to write to"),
    (lambda: write_json("/dev/null", 1), "is no ordinary file; give a file to write to"),
    (lambda: write_json("/proc/x", 1), "cannot be written"),
]


def strangers():
    """Parts of a model that is not there, and a collection of one grey image."""
    word = torch.zeros(1, 1, 4)
    return Parts(
        names=("<part-0>",), embeddings=word, category="<thing>", category_embedding=word[0],
        model="builtin", weights="others", size=(32, 32), layers=("*.attn2",), timestep=1,
        head=torch.zeros(2, 3), norms=torch.zeros(1, 2),
        images=(np.zeros((32, 32, 3), np.uint8),), labels=(np.zeros((32, 32), np.int16),),
    )  # fmt: skip


def completed(**given):
    return lambda: fm.complete(np.zeros((32, 32)), strangers(), **given)


ON, CORNER = np.ones((32, 32), bool), np.eye(32, dtype=bool)
CALLS += [
    (
        lambda: fm.complete(np.zeros((32, 32)), "parts"),
        "parts is a str; wanted what fm.learn_parts",
    ),
    (completed(samples=0), "samples must be a whole number from 1 to 64, got 0"),
    (completed(samples=65), "samples must be a whole number from 1 to 64, got 65"),
    (completed(seed=-1), "seed must be a whole number"),
    (completed(steps=0), "steps must be a whole number from 1 to 1000, got 0"),
    (completed(guidance=NAN), "guidance must be a finite number from 0 to 100"),
    (completed(strength=0), "strength must be a finite number from 0.05 to 1, got 0"),
    (completed(steps=3), "steps=3 at strength=0.3 leave no step to take: give more of either"),
    (completed(progress=1), "progress must be True or False, got 1"),
    (completed(visible=np.zeros((32, 32))), "visible is empty: no pixel of it is set"),
    (completed(occluder=np.zeros((32, 32))), "occluder is empty: no pixel of it is set"),
    (completed(visible=ON[:16]), "visible is 32 x 16 pixels, the image 32 x 32"),
    (completed(visible="nowhere.png"), "visible: there is no file 'nowhere.png'"),
    (
        completed(visible=CORNER, occluder=ON),
        "the occluder covers all that is visible: nothing of the object is seen",
    ),
    (completed(visible=ON, occluder=CORNER), "these parts are words of another model"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words[:40] for _, words in CALLS])
def test_a_call_says_what_is_wrong(call, words):
    with pytest.raises((ValueError, TypeError, IndexError, OSError)) as caught:
        call()
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000 and " at 0x" not in str(caught.value)


def test_there_are_two_hundred():
    assert len(COMMANDS) + len(CALLS) >= 200


# -- files from somebody else ----------------------------------------------------------------------


def copied(room, tmp_path, change):
    """A copy of the tiny model, changed."""
    model = tmp_path / "model"
    shutil.copytree(room / "tiny", model)
    change(model)
    return model


def pickled(part):
    """A part's weights as a pickle, which runs a program when somebody loads it."""

    class Program:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    def change(model):
        (weights,) = (model / part).glob("*.safetensors")
        torch.save({"a": Program()}, weights.with_name("pytorch_model.bin"))
        weights.unlink()

    return change


def index(**changed):
    def change(model):
        path = model / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def written(name, text):
    return lambda model: (model / name).write_text(text)


def emptied(name):
    def change(model):
        for path in (model / name).iterdir():
            path.unlink()

    return change


def cut(model):
    (weights,) = (model / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])


MODELS = {
    "pickled text encoder": (pickled("text_encoder"), "the weights of text_encoder are pickles"),
    "pickled unet": (pickled("unet"), "the weights of unet are pickles, which can run code"),
    "no tokenizer": (emptied("tokenizer"), "its tokenizer has no vocabulary"),
    "no scheduler": (emptied("scheduler"), "its scheduler is empty"),
    "code named": (index(unet=["os", "system"]), "only parts of diffusers and transformers are"),
    "code named elsewhere": (index(extra=["os", "system"]), "its extra is ['os', 'system']"),
    "part of no kind": (index(unet=3), "its model_index.json has 3 for unet"),
    "another pipeline": (index(vae=[None, None]), "could not be loaded"),
    "an index that is a list": (written("model_index.json", "[]"), "it is not an object"),
    "a config that is cut": (written("unet/config.json", '{"a":'), "not a valid JSON"),
    "weights that are cut": (cut, "Unable to load weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_is_wrong_and_runs_nothing(room, tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    change, words = MODELS[name]
    with pytest.raises(ValueError) as caught:
        load_model(str(copied(room, tmp_path, change)))
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def settings(**changed):
    return {**MatchSettings().to_file("0"), **changed}


SETTINGS = {
    "a list": ([], "it holds list; wanted an object"),
    "a number": (3, "it holds int"),
    "no settings": ({"format": "flashmaps match settings 1"}, "settings"),
    "settings that are a list": (settings(settings=[1]), "match settings"),
    "seeds": (settings(settings={"seeds": [-1]}), "seeds must be a whole number >= 0, got -1"),
    "no seeds": (settings(settings={"seeds": []}), "its seeds is empty"),
    "timestep": (settings(settings={"timestep": "x"}), "timestep must be a whole number"),
    "size": (settings(settings={"size": "big"}), "size must be a whole number >= 1, got 'big'"),
    "switch": (settings(settings={"same_noise": "no"}), "same_noise must be True or False"),
    "layers": (settings(settings={"layers": [3]}), "its layers are"),
    "temperature": (settings(settings={"temperature": "hot"}), "temperature"),
    "terms": (settings(confidence={"terms": 3}), "it is no calibration"),
    "bias": (
        settings(confidence={"terms": [], "bias": "x", "tolerance": 0.1, "of": ""}),
        "bias must be a finite number, got 'x'",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_shape_are_named(room, tmp_path, name):
    held, words = SETTINGS[name]
    model = copied(room, tmp_path, written(FILE, json.dumps(held)))
    with pytest.raises(ValueError, match="is not readable as match settings") as caught:
        settings_of(load_model(str(model)))
    assert words in str(caught.value) and FILE in str(caught.value)


def test_settings_nested_without_end_are_named(room, tmp_path):
    model = copied(room, tmp_path, written(FILE, "[" * 100_000))
    with pytest.raises(ValueError, match="is not readable as match settings"):
        settings_of(load_model(str(model)))


RECORD = {
    "layer": "a", "step": 0, "kind": "self", "scale": 1.0, "grid": [4, 4], "frames": 1,
    "guidance": None, "causal": False, "count": 1, "rotated": False, "timestep": 1.0,
    "queries": {"image": [0, 16]}, "keys": {}, "query": "q", "key": "q", "lse": None, "_mask": None,
    "_mask_alike": None, "statistics": {},
}  # fmt: skip
RECORDS = {
    "no entries": None,
    "no JSON": "{",
    "nested without end": "[" * 100_000,
    "an object": "{}",
    "numbers": "[1, 2]",
    "an empty entry": "[{}]",
    "NaN": json.dumps([{**RECORD, "scale": NAN}]),
    **{
        f"{key} {value!r}": json.dumps([{**RECORD, key: value}])
        for key, value in (
            ("layer", 3), ("step", "x"), ("step", -1), ("scale", "x"), ("scale", None),
            ("grid", "ab"), ("grid", [4]), ("grid", [4, -4]), ("frames", 0), ("count", 1.5),
            ("causal", "no"), ("timestep", "x"), ("queries", []), ("queries", {"a": [0]}),
            ("queries", {"a": [5, 2]}), ("keys", 3), ("query", "missing"), ("statistics", ["q"]),
            ("statistics", {"a": "missing"}), ("rotary", ["q", "missing"]), ("rotary", 3),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_a_value_error(tmp_path, name):
    path = tmp_path / "record.safetensors"
    about = {"format": "flashmaps record 1"}
    if RECORDS[name] is not None:
        about["entries"] = RECORDS[name]
    save_file({"q": torch.ones(1, 1, 16, 8)}, path, about)
    with pytest.raises(ValueError, match="is a damaged record"):
        fm.Record.load(path)


@pytest.mark.parametrize("said", [None, "{", "[]", "{}", "3", "[" * 100_000, "changed"])
def test_a_hostile_file_of_features_is_a_value_error(room, tmp_path, said):
    pixels = np.random.default_rng(0).random((48, 64, 3), dtype=np.float32)
    (found,) = features(str(room / "tiny"), pixels, size=64)
    found.save(tmp_path / "whole")
    assert Features.load(tmp_path / "whole").grid == found.grid
    with safe_open(tmp_path / "whole", framework="pt") as file:
        about = dict(file.metadata())
    if said == "changed":
        about["features"] = json.dumps({**json.loads(about["features"]), "grid": [0, "x"]})
    elif said is None:
        del about["features"]
    else:
        about["features"] = said
    save_file(load_file(tmp_path / "whole"), tmp_path / "hostile", about)
    with pytest.raises(ValueError, match=r"is a damaged file of features|holds no features"):
        Features.load(tmp_path / "hostile")


def test_what_is_no_record_is_a_value_error(tmp_path):
    for number, data in enumerate((b"", b"hello", b"\xff" * 100, (1 << 60).to_bytes(8, "little"))):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            fm.Record.load(path)
    whole_one = tmp_path / "whole.safetensors"
    save_file({"q": torch.ones(1, 1, 16, 8)}, whole_one, {"format": "flashmaps record 1",
              "entries": json.dumps([RECORD])})  # fmt: skip
    assert fm.Record.load(whole_one)[0].layer == "a"
    (tmp_path / "cut").write_bytes(whole_one.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fm.Record.load(tmp_path / "cut")


# -- what runs away --------------------------------------------------------------------------------


def test_a_picture_of_a_narrow_image_is_bounded(tmp_path):
    from flashmaps.matching.plots import TALLEST, new_figure

    figure, _ = new_figure(1, 2, 240.0)
    assert max(figure.get_size_inches()) <= TALLEST


def test_a_match_of_a_narrow_image_is_saved(room, tmp_path):
    narrow = np.random.default_rng(0).random((3840, 16, 3), dtype=np.float32)
    found = fm.match(narrow, narrow, model=str(room / "tiny"), size=(64, 32))
    found.save(tmp_path / "out")
    from PIL import Image

    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as image:
            assert max(image.size) <= 24 * 120


# -- text for where it goes ------------------------------------------------------------------------


def test_foreign_text_moves_no_cursor_and_means_nothing():
    from flashmaps import escapes

    assert escapes.printable("a\x1b[31mb\u202ec\nd") == "a\\x1b[31mb\\u202ec\\nd"
    assert escapes.printable("two\nlines\t", lines=True) == "two\nlines\t"
    assert escapes.printable("\u4e2d \u00e9 \udc80") == "\u4e2d \u00e9 \\udc80"
    nasty = "a|b<script>x</script>[c](http://d)![e](f)`g`*h*_i_\n# j & \\"
    shown = escapes.markdown(nasty)
    assert "<" not in shown and "\n" not in shown and "&lt;script&gt;" in shown
    assert "\\|" in shown and "\\[c\\]" in shown and "\\*h\\*" in shown


def test_prompts_and_paths_stay_text_in_what_is_printed_and_written(room, tmp_path):
    prompt, out = "[/x] [bold] a|b <b>", tmp_path / "[/y]|<i>"
    photo = tmp_path / "\x1b[31m[red]x[red].png"
    shutil.copy(room / "photo.png", photo)
    line = ["match", photo, photo, "--model", room / "tiny", "--size", 64, "--prompt", prompt]
    result = CliRunner().invoke(make_app(), [*map(str, line), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    shown = "".join(result.stdout.split())
    assert "[/x][bold]a|b<b>" in shown and "[red]x[red].png" in shown and "[/y]|<i>" in shown
    assert "\x1b" not in result.stdout
    assert json.loads((out / "match.json").read_text())["prompt"] == prompt


def test_results_hold_foreign_text_as_text():
    from flashmaps.evaluation.markdown import table

    rows = table(["a", "b"], [["x|y", "two\nlines"]])
    assert rows[-1] == "| x\\|y | two lines |"
