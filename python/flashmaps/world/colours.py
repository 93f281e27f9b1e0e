"""Colours that have names, and the palettes of objects."""

from __future__ import annotations

from dataclasses import dataclass

from flashmaps.world.dice import Dice

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

# Hue in degrees, saturation and value, each (low, high). The ranges do not touch, so that a colour
# has one name.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.72, 0.90), (0.70, 0.90)),
    "orange": ((24, 33), (0.75, 0.95), (0.92, 1.0)),
    "yellow": ((49, 57), (0.65, 0.90), (0.92, 1.0)),
    "green": ((95, 145), (0.45, 0.75), (0.45, 0.75)),
    "blue": ((205, 228), (0.60, 0.85), (0.60, 0.90)),
    "purple": ((266, 288), (0.45, 0.70), (0.50, 0.75)),
    "pink": ((328, 345), (0.35, 0.52), (0.92, 1.0)),
    "brown": ((20, 30), (0.52, 0.70), (0.38, 0.52)),
    "grey": ((0, 360), (0.00, 0.06), (0.48, 0.62)),
    "white": ((30, 60), (0.00, 0.05), (0.93, 1.0)),
    "black": ((200, 260), (0.05, 0.15), (0.16, 0.22)),
}
COLOURS = tuple(_RANGES)


def sample_colour(name: str, dice: Dice) -> Colour:
    """A colour that people would call by this name."""
    hue, saturation, value = (dice.between(low, high) for low, high in _RANGES[name])
    return from_hsv(hue, saturation, value)


def from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB of a hue in degrees, saturation and value in [0, 1]."""
    sector = (hue / 60) % 6
    low = value * (1 - saturation)

    def channel(offset: float) -> float:
        place = (sector + offset) % 6
        return low + (value - low) * min(max(abs(place - 3) - 1, 0.0), 1.0)

    return channel(0), channel(4), channel(2)


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """``share`` of b in a."""
    return (
        a[0] + share * (b[0] - a[0]),
        a[1] + share * (b[1] - a[1]),
        a[2] + share * (b[2] - a[2]),
    )


def brightness(colour: Colour) -> float:
    """Perceived, in [0, 1]."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


@dataclass(frozen=True)
class Palette:
    """The colours of one object by role: what parts and marks name as their paint."""

    main_name: str
    second_name: str
    roles: dict[str, Colour]


def sample_palette(dice: Dice, avoid: str = "") -> Palette:
    """Main colour and second colour by name, and everything that goes with them."""
    main_name = dice.pick([name for name in COLOURS if name != avoid])
    main = sample_colour(main_name, dice)
    # The texture is in the second colour, so it has to stand out from the first.
    others = [name for name in COLOURS if name not in (main_name, avoid)]
    second_name, second = main_name, main
    for _ in range(8):
        second_name = dice.pick(others)
        second = sample_colour(second_name, dice)
        if abs(brightness(second) - brightness(main)) > 0.16:
            break
    white, black = (0.97, 0.97, 0.95), (0.10, 0.10, 0.13)
    limbs = dice.pick((main, main, second))
    roles = {
        "main": main,
        "second": second,
        "limbs": mixed(limbs, black, dice.between(0.0, 0.25)),
        "pale": mixed(main, white, dice.between(0.45, 0.65)),
        "deep": mixed(main, black, dice.between(0.30, 0.45)),
        "horn": dice.pick(((0.96, 0.62, 0.14), (0.93, 0.75, 0.25), (0.35, 0.30, 0.28))),
        "hoof": mixed(black, (0.4, 0.3, 0.2), dice.unit()),
        "nose": dice.pick(((0.85, 0.50, 0.52), (0.25, 0.18, 0.18))),
        "white": white,
        "black": black,
        "rubber": mixed(black, (0.32, 0.32, 0.34), dice.unit()),
        "metal": mixed((0.62, 0.64, 0.68), white, dice.between(0.0, 0.5)),
        "glass": mixed((0.55, 0.75, 0.88), dice.pick((white, black)), dice.between(0.0, 0.5)),
        "lamp": dice.pick(((1.0, 0.93, 0.55), (1.0, 0.98, 0.88))),
        "wood": mixed((0.56, 0.37, 0.20), black, dice.between(0.0, 0.4)),
        "sail": dice.pick((white, white, second)),
    }
    return Palette(main_name, second_name, roles)
