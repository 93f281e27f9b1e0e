"""The vehicles: drawn on 100 x 100 units, y down, side views facing right."""

from __future__ import annotations

from flashmaps.world.anatomy import Category, Mark, Part
from flashmaps.world.dice import turn
from flashmaps.world.shapes import Shape, box, ellipse, limb, polygon, ring, spline

# A wheel's coordinates do not turn with the wheel: see docs/world.md.


def _wheel(name: str, x: float, y: float, radius: float, parent: str) -> Part:
    return Part(
        name,
        Shape(ellipse(x, y, radius, radius)),
        joint=(x, y), parent=parent, size=(0.85, 1.15), layer=5, paint="rubber", alike="wheel",
        marks=(
            Mark(Shape(ellipse(x, y, 0.58 * radius, 0.58 * radius)), "metal"),
            Mark(Shape(ellipse(x, y, 0.22 * radius, 0.22 * radius)), "rubber"),
        ),
        keypoints={f"{name} hub": (x, y)},
    )  # fmt: skip


def _car() -> Category:
    return Category(
        "car",
        (
            Part(
                "body",
                Shape(polygon((7, 52), (66, 49), (68, 71), (7, 71)), round=3),
                joint=(46, 62), axis=0, length=(0.88, 1.2), width=(0.85, 1.15), layer=3,
                marks=(
                    Mark(Shape(box(3, 69, 72, 76)), "deep", 0.9),
                    Mark(Shape(limb((43, 49, 0.6), (43, 69, 0.6))), "black", 0.6),
                    Mark(Shape(limb((46, 55.5, 1.0), (51, 55.5, 1.0))), "metal"),
                ),
                keypoints={"door handle": (48.5, 55.5), "sill": (40, 72)},
            ),
            Part(
                "cabin",
                Shape(spline((16, 52), (16, 52), (20, 38), (27, 29), (36, 27), (50, 28), (58, 34),
                             (70, 51), (70, 51), (44, 53))),
                joint=(43, 52), parent="body", axis=-90, length=(0.8, 1.3), width=(0.85, 1.12),
                layer=2, keypoints={"roof": (42, 30)},
                marks=(
                    Mark(Shape(polygon((22.5, 48), (26, 36), (30, 33), (39, 32.5), (39, 48)),
                               round=0.8), "glass"),
                    Mark(Shape(polygon((44, 48), (44, 32.5), (49, 33), (53, 37), (60.5, 48)),
                               round=0.8), "glass"),
                ),
            ),
            Part(
                "bonnet",
                Shape(spline((65, 47.5), (65, 47.5), (80, 49), (93, 54), (97, 62), (97, 74),
                             (97, 74), (65, 74), (65, 74))),
                joint=(66, 61), parent="body", axis=0, length=(0.7, 1.25), width=(0.95, 1.05),
                layer=3,
                marks=(
                    Mark(Shape(box(60, 69, 99, 76)), "deep", 0.9),
                    Mark(Shape(ellipse(91.5, 59.5, 3.6, 4.2)), "lamp"),
                ),
                keypoints={"headlamp": (91.5, 59.5), "bumper": (95, 70)},
            ),
            Part(
                "spoiler",
                Shape(polygon((3, 41), (17, 42.5), (17, 45), (10.5, 46), (12, 54), (6, 54),
                              (7, 45.5), (3, 44)), round=0.8),
                joint=(9, 52), parent="body", axis=-90, length=(0.6, 1.5), width=(0.85, 1.2),
                layer=2, paint="second", keypoints={"spoiler end": (4.5, 42.6)},
            ),
            _wheel("rear wheel", 24, 72, 10.5, "body"),
            _wheel("front wheel", 77, 72, 10.5, "bonnet"),
        ),
        rotation=18,
    )  # fmt: skip


def _truck() -> Category:
    return Category(
        "truck",
        (
            Part(
                "chassis",
                Shape(box(6, 67, 94, 73), round=1.5),
                joint=(50, 70), axis=0, length=(0.9, 1.15), width=(0.9, 1.3), layer=2,
                paint="metal", keypoints={"rear end": (8, 70), "front end": (92, 70)},
            ),
            Part(
                "box",
                Shape(polygon((6, 24), (61, 24), (61, 64), (6, 64)), round=2),
                joint=(10, 66), parent="chassis", axis=0, swing=(-22, 3), length=(0.85, 1.08),
                width=(0.75, 1.15), layer=3,
                marks=(
                    Mark(Shape(box(3, 59, 64, 67)), "deep", 0.85),
                    Mark(Shape(limb((24, 29, 0.8), (24, 56, 0.8))), "deep", 0.5),
                    Mark(Shape(limb((43, 29, 0.8), (43, 56, 0.8))), "deep", 0.5),
                ),
                keypoints={"box upper rear": (8, 26), "box upper front": (59, 26),
                           "box lower front": (59, 62)},
            ),
            Part(
                "cab",
                Shape(spline((66, 67), (66, 67), (66, 38), (66, 38), (69, 35), (69, 35), (80, 35),
                             (86, 38), (91, 50), (96, 54), (96, 67), (96, 67))),
                joint=(80, 67), parent="chassis", axis=-90, length=(0.8, 1.2), width=(0.85, 1.1),
                layer=4, paint="second",
                marks=(
                    Mark(Shape(polygon((74, 50), (74, 40.5), (80.5, 40.5), (85.5, 50)), round=1),
                         "glass"),
                    Mark(Shape(limb((72, 55.5, 0.9), (76, 55.5, 0.9))), "black", 0.7),
                    Mark(Shape(ellipse(93, 60, 2.6, 3.2)), "lamp"),
                ),
                keypoints={"truck lamp": (93, 60), "cab roof": (77, 37.5)},
            ),
            Part(
                "exhaust",
                Shape(box(62.2, 22, 65.4, 66), round=0.6),
                joint=(64, 66), parent="chassis", axis=-90, length=(0.8, 1.3), width=(0.9, 1.4),
                layer=2, paint="metal", keypoints={"exhaust top": (63.8, 24)},
            ),
            _wheel("rear wheel", 18, 75, 9.5, "chassis"),
            _wheel("middle wheel", 40, 75, 9.5, "chassis"),
            _wheel("front wheel", 81, 75, 9.5, "chassis"),
        ),
        rotation=15,
    )  # fmt: skip


def _aeroplane() -> Category:
    wing = Part(
        "left wing",
        Shape(spline((47, 38), (47, 38), (4, 60), (2, 64), (4, 68), (47, 60), (47, 60))),
        joint=(47, 48), parent="fuselage", axis=160, swing=(-16, 24), length=(0.75, 1.15),
        width=(0.75, 1.3), layer=2, alike="wing",
        marks=(Mark(Shape(polygon((5, 66), (40, 59.5), (40, 62.5), (6, 69))), "deep", 0.6),
               Mark(Shape(polygon((0, 58), (10, 52), (10, 72), (0, 72))), "second", 0.9)),
        keypoints={"left wing tip": (4.5, 64)},
    )  # fmt: skip
    tailplane = Part(
        "left tailplane",
        Shape(spline((48, 80), (48, 80), (29, 89), (28, 92), (30, 94), (48, 91), (48, 91))),
        joint=(48, 85), parent="fuselage", axis=160, swing=(-14, 18), length=(0.75, 1.3),
        width=(0.8, 1.3), layer=2, paint="second", alike="tailplane",
        keypoints={"left tailplane tip": (31, 91.5)},
    )  # fmt: skip
    engine = Part(
        "left engine",
        Shape(limb((26, 43, 4.2), (26, 54, 3.6))),
        joint=(26, 52), parent="left wing", axis=-90, swing=(-5, 5), length=(0.8, 1.3),
        width=(0.85, 1.3), layer=3, paint="metal", alike="engine",
        marks=(Mark(Shape(ellipse(26, 40.5, 3.6, 2.2)), "black", 0.8),),
        keypoints={"left engine": (26, 48)},
    )  # fmt: skip
    return Category(
        "aeroplane",
        (
            Part(
                "fuselage",
                Shape(spline((50, 3), (55, 9), (57, 20), (57, 60), (55, 78), (51.5, 96), (50, 98),
                             (48.5, 96), (45, 78), (43, 60), (43, 20), (45, 9))),
                joint=(50, 50), axis=-90, length=(0.85, 1.12), width=(0.85, 1.25), layer=4,
                marks=(
                    Mark(Shape(polygon((46, 13.5), (47, 10), (53, 10), (54, 13.5)), round=1),
                         "glass"),
                    *(Mark(Shape(ellipse(x, y, 0.9, 1.3)), "glass")
                      for x in (45.4, 54.6) for y in (24, 31, 38, 45, 52, 59)),
                    Mark(Shape(limb((50, 78, 0.8), (50, 94, 1.5))), "second"),
                ),
                keypoints={"nose": (50, 6), "tail end": (50, 94), "cockpit": (50, 12)},
            ),
            wing,
            wing.reflected("right wing"),
            tailplane,
            tailplane.reflected("right tailplane"),
            engine,
            engine.reflected("right engine", parent="right wing"),
        ),
        symmetric=True, rotation=180, ground=False,
    )  # fmt: skip


def _boat() -> Category:
    return Category(
        "boat",
        (
            Part(
                "hull",
                Shape(spline((6, 70), (6, 70), (50, 73), (95, 67), (95, 67), (88, 80), (78, 88),
                             (78, 88), (50, 90), (20, 88), (20, 88), (11, 80))),
                joint=(48, 76), axis=0, curve=(-0.1, 0.02), length=(0.85, 1.15), width=(0.8, 1.35),
                layer=4,
                marks=(
                    Mark(Shape(polygon((0, 83.5), (100, 82.5), (100, 95), (0, 95))), "second"),
                    Mark(Shape(ellipse(34, 77.5, 2.2, 2.2)), "glass"),
                    Mark(Shape(ellipse(50, 78.2, 2.2, 2.2)), "glass"),
                    Mark(Shape(ellipse(66, 77.5, 2.2, 2.2)), "glass"),
                ),
                keypoints={"bow": (92, 69), "stern": (9, 72)},
            ),
            Part(
                "mast",
                Shape(limb((50, 74, 1.9), (50, 8, 1.5))),
                joint=(50, 72), parent="hull", axis=-90, swing=(-8, 8), length=(0.85, 1.08),
                width=(0.9, 1.5), layer=2, paint="wood", keypoints={"mast foot": (50, 69)},
            ),
            Part(
                "main sail",
                Shape(spline((47.5, 13), (47.5, 13), (48, 40), (47.5, 66), (47.5, 66), (30, 65),
                             (10, 62), (10, 62), (28, 44), (40, 26))),
                joint=(48, 45), parent="mast", axis=180, swing=(-3, 3), length=(0.65, 1.15),
                curve=(-0.12, 0.12), width=(0.85, 1.0), layer=3, paint="main",
                keypoints={"main sail top": (46, 18), "boom end": (14.5, 61.5)},
            ),
            Part(
                "jib",
                Shape(spline((52.5, 18), (52.5, 18), (64, 38), (83, 62), (83, 62), (68, 65),
                             (53, 65.5), (53, 65.5), (55, 42))),
                joint=(52.5, 48), parent="mast", axis=0, swing=(-3, 3), length=(0.65, 1.15),
                curve=(-0.12, 0.12), width=(0.8, 1.0), layer=3, paint="sail",
                keypoints={"jib top": (53.4, 23), "jib corner": (79, 61.5)},
            ),
            Part(
                "flag",
                Shape(spline((50, 3), (50, 3), (40, 4.5), (28, 2), (28, 2), (32, 8), (27, 14),
                             (27, 14), (40, 13), (50, 13), (50, 13))),
                joint=(50, 8), parent="mast", axis=180, swing=(-30, 20), curve=(-0.35, 0.35),
                wave=(-0.3, 0.3), length=(0.7, 1.3), width=(0.8, 1.3), layer=3, paint="second",
                keypoints={"flag end": (33, 8)},
            ),
            Part(
                "rudder",
                Shape(polygon((9, 72), (14, 72), (17, 96), (8, 96)), round=1),
                joint=(12, 76), parent="hull", axis=90, swing=(-12, 15), length=(0.8, 1.3),
                width=(0.8, 1.3), layer=3, paint="wood", keypoints={"rudder end": (12.5, 93.5)},
            ),
        ),
        rotation=18, ground=False,
    )  # fmt: skip


def _bicycle() -> Category:
    def wheel(name: str, x: float, parent: str) -> Part:
        spokes = []
        for n in range(4):
            c, s = turn(n * 45.0 + 10)
            spokes.append(limb((x - 17 * c, 67 - 17 * s, 0.55), (x + 17 * c, 67 + 17 * s, 0.55)))
        return Part(
            name,
            Shape(ring(x, 67, 19, 4.6), ellipse(x, 67, 3.2, 3.2), *spokes),
            joint=(x, 67), parent=parent, size=(0.88, 1.1), layer=1, paint="rubber", alike="wheel",
            marks=(Mark(Shape(ellipse(x, 67, 16.5, 16.5)), "metal"),),
            keypoints={f"{name} bottom": (x, 86), f"{name} top": (x, 48)},
        )  # fmt: skip

    return Category(
        "bicycle",
        (
            Part(
                "frame",
                Shape(
                    limb((24, 67, 1.7), (48, 68, 2.1), (69, 41, 2.2), (38, 42, 2.2), (24, 67, 1.7)),
                    limb((48, 68, 2.1), (36, 35, 2.1)),
                    limb((69, 41, 2.2), (68, 36, 2.2)),
                ),
                joint=(48, 58), axis=0, length=(0.9, 1.1), width=(0.88, 1.15), layer=2,
                keypoints={"down tube": (58.5, 54.5), "seat joint": (38, 42)},
            ),
            wheel("rear wheel", 24, "frame"),
            Part(
                "fork",
                Shape(limb((66.5, 31, 2.0), (69, 42, 2.2), (76, 67, 1.7))),
                joint=(69, 42), parent="frame", axis=75, swing=(-12, 12), length=(0.95, 1.1),
                curve=(-0.06, 0.06), layer=3, paint="second", keypoints={"fork end": (76, 67)},
            ),
            wheel("front wheel", 76, "fork"),
            Part(
                "handlebar",
                Shape(limb((60, 26, 2.4), (67, 28, 2.1), (75, 27, 2.1), (81, 31, 2.1),
                           (79, 37, 2.4))),
                joint=(67, 30), parent="fork", axis=0, swing=(-30, 30), length=(0.8, 1.3),
                width=(0.8, 1.3), layer=4, paint="rubber", keypoints={"grip": (79.5, 35)},
            ),
            Part(
                "saddle",
                Shape(spline((22, 30), (26, 26), (38, 28.5), (50, 29), (51, 32), (42, 34), (34, 38),
                             (25, 36))),
                joint=(36, 34), parent="frame", axis=0, swing=(-14, 10), length=(0.8, 1.25),
                width=(0.85, 1.3), layer=4, paint="hoof", keypoints={"saddle nose": (48.5, 30.8)},
            ),
            Part(
                "pedals",
                Shape(
                    ellipse(48, 68, 6, 6),
                    limb((41, 80, 1.6), (48, 68, 1.9), (55, 56, 1.6)),
                    limb((36, 80, 2.0), (46, 80, 2.0)),
                    limb((50, 56, 2.0), (60, 56, 2.0)),
                ),
                joint=(48, 68), parent="frame", axis=120, swing=(-75, 75), length=(0.85, 1.15),
                layer=5, paint="metal",
                marks=(Mark(Shape(ellipse(48, 68, 2.4, 2.4)), "rubber"),),
                keypoints={"crank": (48, 68), "lower pedal": (41, 80), "upper pedal": (55, 56)},
            ),
        ),
        rotation=18,
    )  # fmt: skip


VEHICLES = (_car(), _truck(), _aeroplane(), _boat(), _bicycle())
