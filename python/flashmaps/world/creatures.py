"""The creatures: drawn on 100 x 100 units, y down, side views facing right."""

from __future__ import annotations

from flashmaps.world.anatomy import Category, Mark, Part
from flashmaps.world.shapes import Shape, ellipse, limb, polygon, spline

_WALK = (-24.0, 24.0)


def _eye(x: float, y: float, radius: float, look: float = 0.25) -> tuple[Mark, ...]:
    """White, pupil and glint; ``look`` shifts the pupil sideways, in radii."""
    glint = 0.2 * radius
    return (
        Mark(Shape(ellipse(x, y, radius, radius)), "white"),
        Mark(Shape(ellipse(x + look * radius, y, 0.62 * radius, 0.66 * radius)), "black"),
        Mark(Shape(ellipse(x + (look + 0.2) * radius, y - 0.28 * radius, glint, glint)), "white"),
    )


def _bird() -> Category:
    def leg(name: str, x: float, layer: int, tone: float) -> Part:
        return Part(
            name,
            Shape(
                limb((x, 66, 4.0), (x + 1, 76, 2.0), (x - 1, 89, 1.8)),
                limb((x - 5, 90, 1.6), (x - 1, 89, 1.9), (x + 7, 90, 1.4)),
            ),
            joint=(x, 68), parent="body", axis=90, swing=(-30, 30), length=(0.75, 1.35),
            width=(0.9, 1.4), layer=layer, paint="horn", tone=tone, alike="leg",
            keypoints={f"{name.split()[0]} foot": (x, 89.5)},
        )  # fmt: skip

    return Category(
        "bird",
        (
            Part(
                "body",
                Shape(spline((76, 44), (72, 60), (56, 72), (38, 70), (24, 61), (24, 54), (40, 44),
                             (58, 34), (70, 34))),
                joint=(52, 54), axis=0, length=(0.88, 1.2), width=(0.85, 1.2), taper=(-0.15, 0.2),
                layer=2, marks=(Mark(Shape(ellipse(64, 62, 15, 10, -35)), "pale", 0.85),),
                keypoints={"breast": (70, 56), "belly": (48, 68)},
            ),
            Part(
                "tail",
                Shape(spline((32, 55), (32, 55), (14, 54), (2, 58), (2, 58), (6, 62), (1, 66),
                             (1, 66), (7, 68), (5, 73), (5, 73), (18, 69), (32, 63), (32, 63))),
                joint=(30, 59), parent="body", axis=175, swing=(-35, 30), curve=(-0.15, 0.15),
                length=(0.7, 1.5), width=(0.8, 1.4), layer=1, paint="second",
                keypoints={"tail tip": (6, 64)},
            ),
            leg("far leg", 57, 0, 0.72),
            leg("near leg", 49, 1, 1.0),
            Part(
                "head",
                Shape(ellipse(70, 29, 15, 14.5)),
                joint=(66, 40), parent="body", axis=-60, swing=(-22, 25), size=(0.85, 1.2),
                width=(0.92, 1.1), layer=4, marks=_eye(74, 26, 4.6),
                keypoints={"eye": (74, 26), "crown": (68, 17)},
            ),
            Part(
                "beak",
                Shape(spline((80, 23), (80, 23), (89, 25), (98, 33), (98, 33), (88, 35), (80, 37),
                             (80, 37))),
                joint=(81, 30), parent="head", axis=0, swing=(-8, 8), length=(0.7, 1.7),
                width=(0.75, 1.3), curve=(-0.1, 0.3), layer=3, paint="horn",
                marks=(Mark(Shape(limb((82, 31.5, 0.6), (95, 33.0, 0.5))), "black", 0.6),),
                keypoints={"beak tip": (95.5, 32.5)},
            ),
            Part(
                "wing",
                Shape(spline((62, 43), (63, 53), (52, 63), (36, 65), (16, 60), (16, 60), (26, 57),
                             (22, 54), (22, 54), (34, 50), (46, 40), (56, 38))),
                joint=(58, 45), parent="body", axis=165, swing=(-18, 95), curve=(-0.2, 0.2),
                length=(0.8, 1.3), width=(0.8, 1.4), layer=5, paint="deep",
                marks=(
                    Mark(Shape(limb((54, 56, 0.8), (32, 60, 0.6))), "pale", 0.7),
                    Mark(Shape(limb((54, 49, 0.8), (34, 54, 0.6))), "pale", 0.7),
                ),
                keypoints={"wing tip": (20, 59.3), "shoulder": (57, 45)},
            ),
        ),
        rotation=25, ground=True,
    )  # fmt: skip


def _fish() -> Category:
    return Category(
        "fish",
        (
            Part(
                "body",
                Shape(spline((82, 50), (76, 64), (58, 71), (40, 66), (22, 54), (22, 46), (40, 34),
                             (58, 29), (76, 36))),
                joint=(62, 50), axis=180, curve=(-0.28, 0.28), wave=(-0.12, 0.12),
                length=(0.9, 1.2), width=(0.7, 1.25), layer=2,
                marks=(Mark(Shape(spline((72, 64), (58, 70), (40, 65), (26, 54), (44, 60),
                                         (60, 63))), "pale", 0.6),),
                keypoints={"back": (54, 33), "belly": (54, 67)},
            ),
            Part(
                "tail",
                Shape(spline((28, 50), (24, 44), (10, 30), (3, 29), (3, 29), (9, 42), (9, 50),
                             (9, 58), (3, 71), (3, 71), (10, 70), (24, 56))),
                joint=(26, 50), parent="body", axis=180, swing=(-30, 30), curve=(-0.2, 0.2),
                length=(0.8, 1.4), width=(0.75, 1.3), layer=1, paint="second",
                marks=(
                    Mark(Shape(limb((20, 47, 0.6), (8, 35, 0.6))), "deep", 0.6),
                    Mark(Shape(limb((20, 53, 0.6), (8, 65, 0.6))), "deep", 0.6),
                ),
                keypoints={"upper tail tip": (5.5, 31.5), "lower tail tip": (5.5, 68.5)},
            ),
            Part(
                "head",
                Shape(spline((72, 33), (72, 33), (84, 37), (95, 48), (95, 53), (84, 63), (72, 66.5),
                             (72, 66.5), (66, 58), (65, 50), (66, 42))),
                joint=(70, 50), parent="body", axis=0, swing=(-8, 8), length=(0.9, 1.2),
                width=(0.9, 1.1), layer=4,
                marks=(
                    *_eye(83, 45, 4.6),
                    Mark(Shape(limb((95, 54, 0.9), (88, 56, 0.9), (84, 55, 0.7))), "black", 0.75),
                ),
                keypoints={"eye": (83, 45), "snout": (93, 50)},
            ),
            Part(
                "dorsal fin",
                Shape(spline((70, 36), (70, 36), (60, 20), (46, 13), (34, 14), (34, 14), (36, 26),
                             (36, 40), (36, 40))),
                joint=(54, 36), parent="body", axis=-100, swing=(-14, 14), curve=(-0.3, 0.3),
                length=(0.6, 1.4), width=(0.85, 1.15), layer=1, paint="second",
                marks=(
                    Mark(Shape(limb((54, 32, 0.6), (45, 17, 0.6))), "deep", 0.6),
                    Mark(Shape(limb((45, 34, 0.6), (38, 18, 0.6))), "deep", 0.6),
                ),
                keypoints={"dorsal fin tip": (37, 16.5)},
            ),
            Part(
                "belly fin",
                Shape(spline((56, 64), (56, 64), (50, 76), (40, 84), (34, 84), (34, 84), (36, 74),
                             (38, 61), (38, 61))),
                joint=(47, 63), parent="body", axis=100, swing=(-18, 18), curve=(-0.3, 0.3),
                length=(0.6, 1.3), width=(0.85, 1.15), layer=1, paint="second",
                keypoints={"belly fin tip": (36.5, 81.5)},
            ),
            Part(
                "side fin",
                Shape(spline((65, 54), (62, 49), (50, 50), (42, 58), (42, 58), (50, 63), (60, 61))),
                joint=(62, 54), parent="body", axis=165, swing=(-40, 40), length=(0.75, 1.35),
                width=(0.7, 1.2), layer=5, paint="deep",
                marks=(Mark(Shape(limb((59, 54, 0.6), (47, 57, 0.6))), "pale", 0.7),),
                keypoints={"side fin tip": (45, 58)},
            ),
        ),
        rotation=30, ground=False,
    )  # fmt: skip


def _cat() -> Category:
    def leg(name: str, x: float, layer: int, tone: float) -> Part:
        hind = "hind" in name
        return Part(
            name,
            Shape(
                limb((x, 58, 8.5 if hind else 7), (x + (1 if hind else 0), 73, 4.8), (x, 87, 4.3)),
                limb((x, 87.5, 4.3), (x + 4.5, 88.2, 3.6)),
            ),
            joint=(x, 58), parent="body", axis=90, swing=_WALK, curve=(-0.15, 0.15),
            length=(0.75, 1.15), width=(0.85, 1.2), layer=layer, tone=tone, alike="leg",
            marks=(Mark(Shape(ellipse(x + 2, 89, 8, 4.6)), "pale", 0.8),),
            keypoints={f"{name[:-4]} paw": (x + 2, 88)},
        )  # fmt: skip

    return Category(
        "cat",
        (
            Part(
                "body",
                Shape(spline((74, 46), (75, 58), (66, 67), (48, 66), (30, 69), (18, 62), (16, 50),
                             (24, 43), (46, 44), (64, 41))),
                joint=(46, 54), axis=0, curve=(-0.12, 0.12), length=(0.85, 1.15),
                width=(0.8, 1.2), layer=3, keypoints={"back": (44, 48), "rump": (20, 52)},
            ),
            Part(
                "tail",
                Shape(limb((22, 50, 4.2), (12, 46, 4.0), (6, 36, 3.8), (6, 24, 3.6),
                           (11, 14, 3.2))),
                joint=(21, 50), parent="body", axis=-125, swing=(-40, 30), curve=(-0.45, 0.45),
                length=(0.75, 1.25), width=(0.8, 1.3), layer=1,
                marks=(Mark(Shape(ellipse(10, 14, 7, 7)), "pale", 0.8),),
                keypoints={"tail tip": (10.5, 15)},
            ),
            leg("far hind leg", 33, 0, 0.68),
            leg("far front leg", 71, 0, 0.68),
            leg("near hind leg", 24, 4, 1.0),
            leg("near front leg", 62, 4, 1.0),
            Part(
                "head",
                Shape(
                    spline((95, 36), (90, 46), (76, 50), (62, 46), (57, 36), (60, 25), (68, 20),
                           (76, 19.5), (84, 20), (92, 25)),
                    spline((57.5, 33), (57.5, 33), (55, 18), (57, 6), (57, 6), (65, 12), (73, 21),
                           (73, 21)),
                    spline((94.5, 33), (94.5, 33), (97, 18), (95, 6), (95, 6), (87, 12), (79, 21),
                           (79, 21)),
                ),
                joint=(70, 46), parent="body", axis=-90, swing=(-20, 20), size=(0.85, 1.15),
                width=(0.92, 1.12), length=(0.92, 1.08), layer=5,
                marks=(
                    Mark(Shape(polygon((59, 22), (58.5, 11), (66, 19.5))), "nose", 0.75),
                    Mark(Shape(polygon((93, 22), (93.5, 11), (86, 19.5))), "nose", 0.75),
                    Mark(Shape(ellipse(76, 42, 10, 6.5)), "pale", 0.8),
                    *_eye(68.5, 32, 4.4, 0.1),
                    *_eye(83.5, 32, 4.4, 0.1),
                    Mark(Shape(polygon((73.4, 38), (78.6, 38), (76, 41.4))), "nose"),
                    Mark(Shape(limb((71, 42.6, 0.7), (73.5, 44.4, 0.7), (76, 42.6, 0.7),
                                    (78.5, 44.4, 0.7), (81, 42.6, 0.7))), "black", 0.7),
                ),
                keypoints={
                    "nose": (76, 39.4), "rear ear tip": (58, 9.5), "front ear tip": (94, 9.5),
                    "rear eye": (68.5, 32), "front eye": (83.5, 32),
                },
            ),
        ),
        rotation=20,
    )  # fmt: skip


def _horse() -> Category:
    def leg(name: str, x: float, layer: int, tone: float) -> Part:
        hind = "hind" in name
        return Part(
            name,
            Shape(
                limb((x, 54, 8 if hind else 6.5), (x + (2 if hind else 0), 68, 4.2),
                     (x - (1 if hind else 0), 78, 3.4), (x, 92, 3.2)),
                polygon((x - 3.4, 90), (x + 3.2, 90), (x + 5.4, 97), (x - 4, 97)),
            ),
            joint=(x, 55), parent="body", axis=90, swing=_WALK, curve=(-0.12, 0.12),
            length=(0.85, 1.15), width=(0.85, 1.2), layer=layer, paint="limbs", tone=tone,
            alike="leg", marks=(Mark(Shape(polygon((x - 6, 90.5), (x + 6, 90.5), (x + 7, 98),
                                                   (x - 6, 98))), "hoof"),),
            keypoints={f"{name[:-4]} hoof": (x + 0.5, 94)},
        )  # fmt: skip

    return Category(
        "horse",
        (
            Part(
                "body",
                Shape(spline((70, 44), (70, 56), (60, 62), (44, 61), (28, 63), (16, 58), (13, 46),
                             (20, 38), (36, 39), (50, 41), (62, 36))),
                joint=(42, 50), axis=0, curve=(-0.08, 0.08), length=(0.85, 1.15),
                width=(0.85, 1.15), layer=3, keypoints={"back": (42, 43), "rump": (17, 45)},
            ),
            Part(
                "tail",
                Shape(spline((17, 40), (10, 42), (4, 54), (1, 74), (1, 74), (9, 72), (14, 60),
                             (18, 48))),
                joint=(16, 43), parent="body", axis=110, swing=(-20, 45), curve=(-0.4, 0.4),
                length=(0.75, 1.25), width=(0.8, 1.5), layer=2, paint="second",
                keypoints={"tail tip": (4, 70)},
            ),
            leg("far hind leg", 31, 0, 0.66),
            leg("far front leg", 65, 0, 0.66),
            leg("near hind leg", 22, 4, 1.0),
            leg("near front leg", 57, 4, 1.0),
            Part(
                "neck",
                Shape(spline((70, 52), (60, 48), (52, 42), (56, 34), (63, 22), (70, 9), (78, 10),
                             (82, 18), (78, 30), (74, 44))),
                joint=(64, 43), parent="body", axis=-60, swing=(-18, 38), curve=(-0.12, 0.15),
                length=(0.85, 1.15), width=(0.85, 1.15), layer=5,
                marks=(
                    Mark(Shape(spline((51, 44), (54, 34), (61, 21), (68, 7), (74, 8), (73, 16),
                                      (68, 22), (67, 30), (61, 36), (60, 44))), "second"),
                ),
                keypoints={"withers": (58, 40)},
            ),
            Part(
                "head",
                Shape(
                    spline((68, 11), (76, 7), (84, 12), (92, 22), (97, 30), (94, 36), (87, 35),
                           (80, 28), (72, 24)),
                    spline((72, 12), (72, 12), (71, 2), (74, 0), (78, 4), (79, 12), (79, 12)),
                ),
                joint=(74, 15), parent="neck", axis=45, swing=(-22, 25), size=(0.88, 1.15),
                length=(0.9, 1.15), layer=6,
                marks=(
                    Mark(Shape(spline((69, 14), (72, 4), (76, 6), (78, 14), (74, 20))), "second"),
                    Mark(Shape(ellipse(93, 31, 5.5, 6, 40)), "pale", 0.7),
                    *_eye(81, 17, 3.1, 0.1),
                    Mark(Shape(ellipse(93.5, 29, 1.0, 1.5, 40)), "black", 0.8),
                ),
                keypoints={"eye": (81, 17), "muzzle": (93, 32), "ear tip": (74, 2.5)},
            ),
        ),
        rotation=18,
    )  # fmt: skip


def _turtle() -> Category:
    front = Part(
        "left front flipper",
        Shape(spline((36, 36), (26, 26), (14, 19), (5, 22), (7, 30), (16, 36), (28, 45))),
        joint=(31, 37), parent="shell", axis=-145, swing=(-38, 38), curve=(-0.25, 0.25),
        length=(0.8, 1.35), width=(0.8, 1.25), layer=1, paint="limbs", alike="front",
        keypoints={"left front tip": (9, 24)},
    )  # fmt: skip
    hind = Part(
        "left hind flipper",
        Shape(spline((36, 68), (26, 72), (17, 80), (15, 88), (22, 90), (31, 84), (40, 77))),
        joint=(35, 73), parent="shell", axis=135, swing=(-35, 35), curve=(-0.2, 0.2),
        length=(0.75, 1.4), width=(0.8, 1.25), layer=1, paint="limbs", alike="hind",
        keypoints={"left hind tip": (19, 86.5)},
    )  # fmt: skip
    return Category(
        "turtle",
        (
            Part(
                "shell",
                Shape(spline((50, 25), (66, 30), (76, 44), (76, 60), (66, 76), (50, 83), (34, 76),
                             (24, 60), (24, 44), (34, 30))),
                joint=(50, 54), axis=90, length=(0.85, 1.15), width=(0.85, 1.15),
                taper=(-0.15, 0.1), layer=3,
                marks=(
                    Mark(Shape(polygon((50, 36), (60, 43), (60, 53), (50, 60), (40, 53), (40, 43)),
                               round=0.5), "second", 0.9),
                    Mark(Shape(polygon((50, 64), (58, 68.5), (56, 76), (50, 78), (44, 76),
                                       (42, 68.5)), round=0.5), "second", 0.9),
                    Mark(Shape(polygon((64, 42), (70, 46), (71, 56), (64, 60)), round=0.5),
                         "second", 0.9),
                    Mark(Shape(polygon((36, 42), (30, 46), (29, 56), (36, 60)), round=0.5),
                         "second", 0.9),
                    Mark(Shape(polygon((44, 33), (50, 31), (56, 33), (50, 34)), round=0.5),
                         "second", 0.9),
                ),
                keypoints={"shell front": (50, 30), "shell back": (50, 79)},
            ),
            front,
            front.reflected("right front flipper"),
            hind,
            hind.reflected("right hind flipper"),
            Part(
                "tail",
                Shape(spline((46, 80), (46, 80), (48, 90), (50, 98), (50, 98), (52, 90), (54, 80),
                             (54, 80))),
                joint=(50, 82), parent="shell", axis=90, swing=(-30, 30), curve=(-0.25, 0.25),
                length=(0.7, 1.5), width=(0.9, 1.4), layer=1, paint="limbs",
                keypoints={"tail tip": (50, 94)},
            ),
            Part(
                "head",
                Shape(spline((50, 2), (58, 5), (60, 13), (57, 21), (55, 33), (45, 33), (43, 21),
                             (40, 13), (42, 5))),
                joint=(50, 27), parent="shell", axis=-90, swing=(-28, 28), length=(0.75, 1.2),
                size=(0.9, 1.15), layer=2, paint="limbs",
                marks=(*_eye(45, 10, 2.9, 0), *_eye(55, 10, 2.9, 0)),
                keypoints={"snout": (50, 4.5), "left eye": (45, 10), "right eye": (55, 10)},
            ),
        ),
        symmetric=True, rotation=180, ground=False,
    )  # fmt: skip


def _crab() -> Category:
    legs = Part(
        "left legs",
        Shape(
            limb((32, 62, 3), (17, 56, 2.8), (5, 66, 1.3)),
            limb((33, 67, 3), (19, 66, 2.8), (8, 78, 1.3)),
            limb((36, 71, 3), (25, 76, 2.8), (17, 89, 1.3)),
        ),
        joint=(34, 66), parent="body", axis=165, swing=(-16, 16), curve=(-0.15, 0.15),
        length=(0.8, 1.25), width=(0.85, 1.15), layer=0, paint="limbs", alike="legs",
        keypoints={"left upper foot": (6.5, 65), "left lower foot": (18, 87)},
    )  # fmt: skip
    claw = Part(
        "left claw",
        Shape(
            limb((33, 54, 3.6), (20, 48, 3.4), (18, 36, 3.4)),
            spline((13, 36), (7, 26), (9, 14), (18, 7), (18, 7), (17, 17), (20, 22), (20, 22),
                   (24, 16), (28, 10), (28, 10), (32, 20), (29, 32), (22, 38)),
        ),
        joint=(34, 55), parent="body", axis=-125, swing=(-30, 22), curve=(-0.15, 0.15),
        length=(0.85, 1.2), width=(0.9, 1.25), size=(0.85, 1.2), layer=4, alike="claw",
        keypoints={"left claw tip": (17, 10.5), "left elbow": (20, 47)},
    )  # fmt: skip
    eye = Part(
        "left eye",
        Shape(limb((42, 50, 1.8), (41, 38, 1.8)), ellipse(41, 34, 5.4, 5.4)),
        joint=(42, 49), parent="body", axis=-90, swing=(-14, 14), length=(0.8, 1.3),
        layer=2, alike="eye", marks=_eye(41, 34, 4.4, 0.15), keypoints={"left pupil": (41.5, 34)},
    )  # fmt: skip
    return Category(
        "crab",
        (
            Part(
                "body",
                Shape(spline((50, 43), (66, 45), (78, 54), (76, 66), (64, 76), (50, 78), (36, 76),
                             (24, 66), (22, 54), (34, 45))),
                joint=(50, 60), axis=0, length=(0.85, 1.2), width=(0.85, 1.15), layer=3,
                marks=(
                    Mark(Shape(ellipse(50, 73, 19, 7)), "pale", 0.7),
                    Mark(Shape(limb((41, 64, 1.0), (46, 67.5, 1.0), (54, 67.5, 1.0),
                                    (59, 64, 1.0))), "black", 0.8),
                ),
                keypoints={"shell left": (26, 58), "shell right": (74, 58), "mouth": (50, 67)},
            ),
            legs,
            legs.reflected("right legs"),
            eye,
            eye.reflected("right eye"),
            claw,
            claw.reflected("right claw"),
        ),
        symmetric=True, rotation=25,
    )  # fmt: skip


def _butterfly() -> Category:
    upper = Part(
        "left upper wing",
        Shape(spline((48, 50), (44, 34), (32, 16), (14, 8), (4, 14), (5, 32), (14, 48), (32, 55))),
        joint=(48, 46), parent="body", axis=-155, swing=(-16, 18), length=(0.6, 1.15),
        width=(0.85, 1.2), curve=(-0.12, 0.12), layer=2, alike="upper",
        marks=(
            Mark(Shape(ellipse(17, 24, 8, 8)), "second"),
            Mark(Shape(ellipse(17, 24, 3.6, 3.6)), "black", 0.8),
            Mark(Shape(ellipse(32, 38, 6, 4.5, 45)), "second"),
        ),
        keypoints={"left upper wing tip": (8, 14), "left upper spot": (17, 24)},
    )  # fmt: skip
    lower = Part(
        "left lower wing",
        Shape(spline((49, 52), (34, 53), (18, 58), (11, 70), (18, 84), (30, 92), (40, 84),
                     (46, 68))),
        joint=(48, 55), parent="body", axis=130, swing=(-16, 18), length=(0.65, 1.2),
        width=(0.8, 1.15), curve=(-0.12, 0.12), layer=1, alike="lower",
        marks=(
            Mark(Shape(ellipse(25, 74, 7, 7)), "second"),
            Mark(Shape(ellipse(25, 74, 3, 3)), "black", 0.8),
        ),
        keypoints={"left lower wing tip": (27, 88.5), "left lower spot": (25, 74)},
    )  # fmt: skip
    feeler = Part(
        "left feeler",
        Shape(limb((48, 28, 1.5), (43, 16, 1.4), (36, 8, 1.4)), ellipse(35.5, 7, 3, 3)),
        joint=(48, 27), parent="body", axis=-120, swing=(-18, 18), curve=(-0.3, 0.3),
        length=(0.75, 1.3), layer=0, paint="hoof", alike="feeler",
        keypoints={"left feeler tip": (35.5, 7)},
    )  # fmt: skip
    return Category(
        "butterfly",
        (
            Part(
                "body",
                Shape(limb((50, 28, 5.4), (50, 36, 3.6), (50, 44, 4.6), (50, 56, 3.8),
                           (50, 82, 2.2))),
                joint=(50, 50), axis=90, curve=(-0.15, 0.15), length=(0.85, 1.15),
                width=(0.9, 1.4), layer=4, paint="hoof",
                marks=(
                    Mark(Shape(ellipse(47.6, 26, 1.7, 1.9)), "white"),
                    Mark(Shape(ellipse(52.4, 26, 1.7, 1.9)), "white"),
                    Mark(Shape(limb((46, 60, 0.7), (54, 60, 0.7))), "pale", 0.8),
                    Mark(Shape(limb((46, 67, 0.7), (54, 67, 0.7))), "pale", 0.8),
                ),
                keypoints={"forehead": (50, 26), "body end": (50, 80)},
            ),
            upper,
            upper.reflected("right upper wing"),
            lower,
            lower.reflected("right lower wing"),
            feeler,
            feeler.reflected("right feeler"),
        ),
        symmetric=True, rotation=60, ground=False,
    )  # fmt: skip


CREATURES = (_bird(), _fish(), _cat(), _horse(), _turtle(), _crab(), _butterfly())
