"""Training without labels: views and their losses, and pairs that see each other."""

import math
import time

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from flashmaps import world
from flashmaps.models import views
from flashmaps.models.agreement import Reader, Seen, _attention, disagreement, targets
from flashmaps.models.architecture import TINY, build
from flashmaps.models.batch import CLEAR, Rows, draw
from flashmaps.models.mutual import Mutual, MutualAttention, share_attention
from flashmaps.models.pictures import FIRST, SECOND, VIEW, Pictures
from flashmaps.models.store import Store, Stream, add_drawn
from flashmaps.models.unet import AGREEING
from flashmaps.models.views import recoloured, warped
from flashmaps.world.repaint import repainted

PLANE = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1)  # its pixels say where they are


def planes(count: int) -> torch.Tensor:
    one = np.concatenate([PLANE * 4, np.zeros((64, 64, 1), int)], -1).astype(np.uint8)
    return torch.from_numpy(one).expand(count, -1, -1, -1)


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_view_comes_from_where_it_says():
    views, where = warped(planes(8), 16, chance(0))
    assert views.shape == (8, 64, 64, 3) and views.dtype == torch.uint8
    # The picture's colours are 4 (x, y) at pixel centres, so a cell's mean colour is its place.
    found = views.double().view(8, 16, 4, 16, 4, 3).mean((2, 4))[..., :2] / 4
    wanted = where.double() * 64 - 0.5
    inside = ((wanted > 4) & (wanted < 58)).all(-1)  # all of the cell lies within the frame
    assert (inside.sum((1, 2)) > 20).all()
    # Colours are rounded to a quarter of a pixel.
    assert (found - wanted).abs()[inside].max() < 0.125 + 0.05


def test_views_repeat_with_their_seed_and_some_are_mirrored():
    same = [warped(planes(2), 16, chance(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))
    assert not torch.equal(same[0][1][0], same[0][1][1])  # each picture is warped on its own
    for mirror, sign in ((0.0, 1), (1.0, -1)):
        _, where = warped(planes(4), 16, chance(4), mirror=mirror)
        steps = torch.stack([where[:, 8, 12] - where[:, 8, 4], where[:, 12, 8] - where[:, 4, 8]], 1)
        assert (torch.linalg.det(steps).sign() == sign).all()


def test_colours_change_and_places_do_not(monkeypatch):
    image = world.Split("train", size=64, count=1)[0].image
    changed = [recoloured(image, np.random.default_rng(seed)) for seed in range(6)]
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in changed)
    assert len({each.tobytes() for each in [image, *changed]}) == 7
    monkeypatch.setattr(views, "_PATTERNED", 0.0)
    halves = np.full((32, 32, 3), (200, 40, 40), np.uint8)
    halves[:, 16:] = 40, 60, 190
    apart = 0
    for seed in range(24):
        found = recoloured(halves, np.random.default_rng(seed)).astype(float)
        # Away from where they meet (colours are told apart in 3 x 3 pixels), each half is of one
        # colour; what remains is grain of at most 0.03, of which 400 pixels show no more than 5.
        for half in (found[:, :14], found[:, 18:]):
            assert np.abs(half - half.mean((0, 1))).max() < 0.03 * 255 * 5
        apart += np.abs(found[:, :14].mean((0, 1)) - found[:, 18:].mean((0, 1))).max() > 20
    assert apart > 18  # two colours stay two but for chance


def test_what_the_world_paints_anew_stays_where_it_was():
    for index in range(3):
        scene = world.Split("train", size=96, count=3)[index]
        image = repainted(scene, "a", index)
        assert image.shape == scene.image.shape and image.dtype == np.uint8
        assert np.array_equal(image, repainted(scene, "a", index))
        other = repainted(scene, "b", index)
        changed = (np.abs(image.astype(int) - other.astype(int)) > 24).any(-1)
        assert changed[scene.instance >= 0].mean() > 0.3 and changed.mean() > 0.3
    # Outlines stay: over many paints and grounds colours change most where the object ends.
    lone = world.Options(objects=(1, 1), occluders=(0, 0), clutter=(0, 0), light=0.0, grain=0.0)
    scene = world.Split("train", size=96, count=1, options=lone)[0]
    images = np.stack([repainted(scene, "outline", n) for n in range(24)]).astype(float)
    inside = scene.instance >= 0
    steps = np.abs(np.diff(images, axis=2)).max(-1).mean(0)
    edge = inside[:, 1:] != inside[:, :-1]
    assert steps[edge].mean() > 2 * steps[~edge].mean()


def test_an_example_shows_one_object_twice_and_no_label():
    pictures = Pictures(size=64, count=3, photos=0.0)
    for index in range(3):
        example = pictures[index]
        assert example.images.shape == (3, 64, 64, 3) and example.labels is None
        assert not np.array_equal(example.images[FIRST], example.images[SECOND])
    assert VIEW == 2


def test_two_pictures_of_one_object_have_its_paint_and_another_pose():
    pairs = world.pairs("train", 12, same=True)
    others = world.pairs("train", 12)
    for pair, other in zip(pairs, others, strict=True):
        one, two = pair.a.instances[pair.instance_a], pair.b.instances[pair.instance_b]
        assert pair.a.looks(pair.instance_a) == pair.b.looks(pair.instance_b)
        assert (one.category, one.colour, one.second_colour, one.texture) == (
            two.category, two.colour, two.second_colour, two.texture,
        )  # fmt: skip
        assert one.box != two.box
        assert np.array_equal(pair.a.image, other.a.image)  # only the second one is repainted
        again = other.b.instances[other.instance_b]
        assert two.box == again.box and two.angle == again.angle
        assert f"{one.colour} {one.category}" in pair.b.caption


@pytest.mark.parametrize("grid", [1, 2, 4, 8])
def test_targets_are_bilinear_and_none_outside(grid):
    generator = torch.Generator().manual_seed(grid)
    where = torch.rand(2, 8, 8, 2, generator=generator) * 1.4 - 0.2
    wanted = targets(where, grid)
    places = where.reshape(2, grid, 8 // grid, grid, 8 // grid, 2).mean((2, 4)).flatten(1, 2)
    inside = ((places >= 0) & (places <= 1)).all(-1)
    torch.testing.assert_close(wanted.sum(-1), inside.float())
    centres = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    mean = wanted @ torch.stack([x, y], -1).flatten(0, 1)
    # Between the outermost centres bilinear weights have their point as mean.
    held = places.clamp(centres[0], centres[-1])
    torch.testing.assert_close(mean[inside], held[inside], atol=1e-5, rtol=0)


def identity(side: int, count: int) -> torch.Tensor:
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], -1).expand(count, side, side, 2)


def seen(vectors: torch.Tensor, factor: float) -> list[tuple[Seen, int]]:
    return [(Seen(vectors, factor * vectors, factor * vectors), 1)]


def test_losses_are_nothing_where_views_agree_and_log_n_where_all_looks_alike():
    tokens = torch.eye(16).expand(3, 16, 16)
    losses, found = disagreement(seen(tokens, 20.0), identity(4, 1))
    assert set(losses) == {"features", "attention", "walks"} and found == 1
    # Fifteen others at exp(-1 / 0.07) each, and walks through two such maps.
    assert all(0 <= loss < 3 * 15 * math.exp(-1 / 0.07) for loss in losses.values())
    losses, _ = disagreement(seen(torch.ones(3, 16, 16), 1.0), identity(4, 1))
    for loss in losses.values():
        torch.testing.assert_close(loss, torch.tensor(math.log(16)))


def test_two_views_alone_agree_as_they_do_with_a_third():
    generator = torch.Generator().manual_seed(0)
    three, where = torch.randn(6, 16, 8, generator=generator), identity(4, 2)
    two = three[[0, 1, 4, 5]]
    all_three, found = disagreement(seen(three, 1.0), where)
    alone, found_alone = disagreement(seen(two, 1.0), where)
    assert set(alone) == {"features", "attention"} and found == found_alone
    assert all(torch.equal(alone[name], all_three[name]) for name in alone)


def test_rows_that_are_asked_for_have_on_average_the_loss_of_all():
    generator = torch.Generator().manual_seed(0)
    tokens, where = torch.randn(6, 16, 8, generator=generator), identity(4, 2)
    whole, _ = disagreement(seen(tokens, 1.0), where)
    order = torch.randperm(16, generator=generator)
    parts = [disagreement(seen(tokens, 1.0), where, rows)[0] for rows in order.split(4)]
    for name, loss in whole.items():  # each row has one place, so each part the same weight
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), loss)
    assert all(
        torch.equal(disagreement(seen(tokens, 1.0), where, order)[0][n], whole[n]) for n in whole
    )


def test_a_walk_may_pass_anywhere_if_it_comes_back():
    first = torch.eye(16)
    moved = first[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    tokens = torch.stack([first, moved, first])
    losses, _ = disagreement(seen(tokens, 20.0), identity(4, 1))
    assert losses["walks"] < 1e-3
    lost = torch.stack([first, torch.ones(16, 16), first])  # nothing there tells the way back
    losses, _ = disagreement(seen(lost, 20.0), identity(4, 1))
    torch.testing.assert_close(losses["walks"], torch.tensor(math.log(16)), atol=1e-3, rtol=0)


def test_the_loss_on_attention_is_that_of_the_library_s_map():
    import flashmaps as fm

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 9, 8, generator=generator) for _ in range(2))
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, key)]
    dense = fm.AttentionMap(*heads, backend="reference").to_dense()
    torch.testing.assert_close(_attention(query, key, 2), dense)


def test_the_reader_sees_what_a_whole_pass_shows_and_ends_it():
    unet = build(TINY).unet
    reader = Reader(unet, AGREEING)
    given = torch.randn(3, 4, 8, 8), torch.tensor([5] * 3), torch.randn(3, 77, 8)
    whole: dict[str, torch.Tensor] = {}
    for name in AGREEING:
        block = unet.get_submodule(name)
        block.register_forward_hook(lambda _, __, out, name=name: whole.update({name: out}))
    behind = []
    unet.conv_out.register_forward_hook(lambda *_: behind.append(1))
    with torch.no_grad():
        unet(*given)
        layers = reader.look(unet, *given)
        assert behind == [1]  # of the whole pass
        assert unet(*given).sample.shape == (3, 4, 8, 8)  # and the next one is whole again
    assert [heads for _, heads in layers] == [1, 1]
    for (layer, _), name in zip(layers, AGREEING, strict=True):
        assert torch.equal(layer.output, whole[name])
        assert layer.query.shape == layer.key.shape == layer.output.shape


def predicted(unet, rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 77, 8, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([300] * rows), text).sample


def test_pairs_see_each_other_and_nobody_else_does():
    unet = build(TINY).unet.eval()
    alone = predicted(unet)
    mutual = Mutual()
    share_attention(unet, mutual)
    kinds = {type(p).__name__ for n, p in unet.attn_processors.items() if "up_blocks" in n}
    assert "MutualAttention" in kinds
    torch.testing.assert_close(predicted(unet), alone)
    with mutual.among(1, 2):
        together = predicted(unet)
    torch.testing.assert_close(together[[0, 5]], alone[[0, 5]])
    assert (together - alone)[1:5].abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(predicted(unet), alone)  # only while it lasts


@pytest.mark.parametrize("blind", [False, True])
def test_mutual_attention_is_the_library_s_cross_self_attention(blind):
    """The same maps as CrossSelfAttnProcessor's "both"; blind rows as its "other"."""
    unet = build(TINY).unet.eval()
    attn = unet.get_submodule(AGREEING[0] + ".attn1")
    tokens = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    mutual = Mutual()
    attn.set_processor(MutualAttention(mutual))
    with torch.no_grad(), mutual.among(0, 2, blind):  # pairs (0, 2) and (1, 3)
        found = attn(tokens)
        query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        for row, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
            rows = [other] if blind and row < 2 else [row, other]
            keys, values = (x[rows].flatten(0, 1) for x in (key, value))
            wanted = attn.to_out[0]((query[row] @ keys.T * attn.scale).softmax(-1) @ values)
            torch.testing.assert_close(found[row], wanted)


def test_mutual_attention_refuses_what_it_is_not_for():
    attn = build(TINY).unet.get_submodule(AGREEING[0] + ".attn1")
    with pytest.raises(ValueError, match="without a mask"):
        MutualAttention(Mutual())(attn, torch.zeros(2, 4, 8), attention_mask=torch.zeros(2, 1, 4))


def test_rows_of_a_batch():
    assert Rows.of(64, views=0.375, mutual=0.3125) == Rows(8, 10, 20)
    assert Rows.of(64, views=0.0, mutual=0.0) == Rows(0, 0, 64)
    assert Rows.of(32, views=0.75, mutual=0.125, kinds=2) == Rows(12, 2, 4, 2)
    with pytest.raises(ValueError, match="no room for 1 pictures in 3 views, 1 pairs"):
        Rows.of(5, views=0.3, mutual=0.3)


def test_a_batch_shows_views_of_one_example_with_little_noise_and_the_cleaner_of_a_pair():
    rows = Rows(3, 4, 5)
    number = torch.arange(7.0)[:, None] * 10 + torch.arange(3.0)  # example and picture
    latents = torch.stack([number, torch.zeros_like(number)], -1)[..., None, None, None]
    latents = latents.expand(7, 3, 2, 4, 2, 2)
    views = latents[:, VIEW]
    tokens = torch.arange(7 * 2 * 3)[:, None].expand(-1, 77).reshape(7, 2, 3, 77) + 1
    store = Store(latents[:, :VIEW], tokens, torch.empty(7, 0))
    empty = torch.zeros(1, 77, dtype=torch.long)
    texts = []
    for seed in range(6):
        shown = draw(rows, store, empty, chance(seed), views.__getitem__)
        seen = shown.clean[:, 0, 0, 0].long()
        assert torch.equal(seen // 10, shown.example)
        assert torch.equal(seen[:9] % 10, torch.arange(3).repeat_interleave(3))
        assert torch.equal(shown.example[:9], shown.example[:3].repeat(3))
        assert (shown.t[:9] < CLEAR).all() and (shown.ids[:9] == 0).all()
        noisier, cleaner = shown.t[9:13], shown.t[13:17]
        assert (cleaner <= noisier).all()
        assert torch.equal(seen[9:13] % 10 + seen[13:17] % 10, torch.ones(4).long())
        assert (seen[9:] % 10 < VIEW).all()  # recoloured pictures are never drawn
        told = shown.ids[9:, 0] - 1
        given = told >= 0
        assert torch.equal(told[given] // 3, (seen[9:] // 10 * 2 + seen[9:] % 10)[given])
        texts.append(given.float().mean().item())
    assert 0.5 < np.mean(texts) < 1
    numbers = torch.arange(22)
    assert numbers[rows.denoised].tolist() == list(range(9, 22))
    assert numbers[rows.plainly].tolist() == list(range(17, 22))
    with torch.no_grad():
        first = draw(rows, store, empty, chance(0), views.__getitem__, only_first=True)
    assert (first.clean[17:, 0, 0, 0].long() % 10 == FIRST).all()
    two = draw(Rows(3, 0, 2, kinds=2), store, empty, chance(0), views.__getitem__)
    pictures = two.clean[:6, 0, 0, 0].long() % 10
    assert pictures.tolist() == 3 * [FIRST] + 3 * [VIEW]
    assert torch.equal(two.example[:6], two.example[:3].repeat(2))


def test_a_store_grows_by_what_a_stream_draws():
    tokenizer = build(TINY).tokenizer
    pictures = Pictures(size=32, count=7, photos=0.0)
    first = [pictures[index] for index in range(3)]
    images = torch.from_numpy(np.stack([example.images for example in first]))
    small = Store(torch.zeros(3, 2, 2, 4, 1, 1).half(), torch.zeros(3, 2, 3, 77), images[:, VIEW])
    store = small.with_room(3)  # one fewer than is drawn
    assert len(store) == 3 and torch.equal(store.paint[:3], images[:, VIEW])
    stream = Stream(pictures, 3, workers=1, tokenizer=tokenizer)
    assert stream.count == 4
    stream.start(torch.device("cpu"))
    brightness = lambda x: x.float().mean((1, 2, 3)).half()[:, None, None, None, None]  # noqa: E731
    limit = time.monotonic() + 60
    while len(store) < 6 and time.monotonic() < limit:
        add_drawn(store, stream, lambda x: brightness(x).expand(-1, 2, 4, 1, 1))
        time.sleep(0.01)
    stream.close()
    for place in range(3, 6):
        example = pictures[place]
        assert np.array_equal(store.paint[place].numpy(), example.images[VIEW])
        ids = tokenizer(list(example.captions[1]), padding="max_length").input_ids
        assert store.tokens[place, SECOND].tolist() == ids
        shown = torch.from_numpy(example.images[SECOND])[None]
        assert store.latents[place, SECOND, 0, 0, 0, 0] == brightness(shown).item()
    broken = Stream(pictures, 3, workers=1, tokenizer=None)
    broken.start(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="a process that draws pictures failed"):
        while time.monotonic() < limit:
            broken.ready()
    broken.close()


def test_shifted_views_still_say_where_each_cell_comes_from():
    side, count = 8, 6
    generator = torch.Generator().manual_seed(0)
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    place = torch.stack([x, y], -1).expand(count, side, side, 2)
    turned = place.flip(2)  # the views are mirrored
    numbered = torch.arange(count).view(-1, 1, 1, 1).expand(count, 1, side, side)
    first = torch.cat([place.permute(0, 3, 1, 2), numbered], 1)
    pictures = torch.cat([first, first.flip(3)])
    shifted, where = views.moved(pictures, turned, 0.4, generator)
    known = ((where >= 0) & (where <= 1)).all(-1)
    assert 0.2 < known.float().mean() < 1
    new, view = shifted.split(count)
    cells = (where * side).long().clamp(0, side - 1)
    rows = torch.arange(count)[:, None, None]
    there = new.permute(0, 2, 3, 1)[rows, cells[..., 1], cells[..., 0]]
    seen = view.permute(0, 2, 3, 1)
    assert torch.equal(there[known], seen[known])  # the same point of the same picture
    bare = new[:, 2] != numbered[:, 0]
    assert bare.any() and torch.equal(new[:, 2][bare], numbered.roll(1, 0)[:, 0][bare].float())
    still, same = views.moved(pictures, turned, 0.0, generator)
    assert torch.equal(still, pictures) and torch.equal(same, turned)
