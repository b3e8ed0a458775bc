"""The demo's data: rendered scenes, each with a dense caption, questions and a text, made from a seed.

A scene belongs to one of twelve themes. The theme decides what is likely in it: which things, in which colours,
on which ground, laid out how, with which written word. So scenes, and captions, have a geometry to learn: near
are those of one theme, nearer those that share things, colours and places. Nothing here needs a network.

`Scene` says what is in a picture; `render`, `write_caption`, `write_questions` and `write_text` are views of it. Scenes are split
into training and validation by content: the combination of coloured things in a validation scene never occurs in
training.
"""

import hashlib
import json
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 205, 50),
    "green": (46, 140, 70),
    "blue": (38, 96, 200),
    "purple": (122, 60, 160),
    "white": (245, 245, 245),
    "black": (35, 35, 40),
    "brown": (125, 80, 45),
    "pink": (240, 130, 170),
}
SIZES = {"small": 0.10, "large": 0.17}  # half the width of a thing, as a fraction of the picture's
PLACES = {
    (0, 0): "at the top left", (1, 0): "at the top", (2, 0): "at the top right",
    (0, 1): "on the left", (1, 1): "in the middle", (2, 1): "on the right",
    (0, 2): "at the bottom left", (1, 2): "at the bottom", (2, 2): "at the bottom right",
}  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Theme:
    """What is likely in a scene of this kind."""

    name: str
    ground: str
    """How captions describe the background."""
    sky_colour: tuple[int, int, int]
    ground_colour: tuple[int, int, int]
    horizon: float
    """Height of the line between sky and ground, 0 at the top."""
    things: dict[str, str]
    """What is there, and the shape it is drawn as; the first are the likeliest."""
    colours: tuple[str, ...]
    """Likely colours, the first the likeliest."""
    cells: tuple[tuple[int, int], ...]
    """Places, of a 3 x 3 grid, that things are put at first."""
    words: tuple[str, ...]
    mood: str


_ROW = ((0, 2), (1, 2), (2, 2), (1, 1))
_TOP = ((0, 0), (1, 0), (2, 0), (1, 1))
_RING = ((0, 1), (2, 1), (1, 0), (1, 2))
_CORNERS = ((0, 0), (2, 2), (2, 0), (0, 2))
_LEFT = ((0, 0), (0, 1), (0, 2), (1, 1))
_RIGHT = ((2, 0), (2, 1), (2, 2), (1, 1))
THEMES = (
    Theme("harbour", "calm blue water under a pale sky", (200, 225, 240), (60, 120, 170), 0.45,
          {"boat": "boat", "buoy": "disc", "sail": "triangle", "lighthouse": "bar", "gull": "cross"},
          ("white", "red", "blue", "orange"), _ROW, ("PIER", "DOCK"), "The ships wait for the tide"),
    Theme("farm", "a green field under a bright sky", (170, 215, 250), (110, 170, 80), 0.50,
          {"barn": "house", "tree": "tree", "haystack": "triangle", "sun": "disc", "fence": "bar"},
          ("brown", "red", "green", "yellow"), _ROW, ("HAY", "BARN"), "The day on the land is long and quiet"),
    Theme("night sky", "deep darkness above a dim horizon", (15, 18, 50), (30, 30, 70), 0.85,
          {"star": "star", "moon": "crescent", "planet": "ring", "comet": "diamond", "rocket": "bar"},
          ("yellow", "white", "orange", "pink"), _TOP, ("ORBIT", "LUNA"), "All is silent and very far away"),
    Theme("kitchen", "a wooden table before a cream wall", (245, 235, 210), (170, 120, 75), 0.60,
          {"cup": "cup", "plate": "disc", "loaf": "bar", "apple": "heart", "jar": "square"},
          ("white", "brown", "red", "green"), _ROW, ("TEA", "MENU"), "Somebody will sit down to eat soon"),
    Theme("garden", "soft grass with a light hedge behind it", (190, 225, 180), (90, 160, 90), 0.35,
          {"flower": "flower", "bush": "disc", "butterfly": "heart", "tree": "tree", "pot": "square"},
          ("pink", "purple", "yellow", "green"), _CORNERS, ("ROSE", "BLOOM"), "Bees can be heard among the leaves"),
    Theme("street", "grey asphalt in front of a row of walls", (190, 190, 195), (95, 95, 100), 0.65,
          {"house": "house", "lamp": "bar", "sign": "hexagon", "wheel": "ring", "crate": "square"},
          ("black", "red", "blue", "yellow"), _LEFT, ("STOP", "TAXI"), "The traffic never stops for long"),
    Theme("desert", "yellow sand below a burning sky", (250, 200, 120), (225, 180, 95), 0.55,
          {"tent": "triangle", "cactus": "cross", "sun": "disc", "rock": "hexagon", "snake": "crescent"},
          ("orange", "green", "brown", "red"), _RIGHT, ("OASIS", "DUNE"), "There is no shade for many miles"),
    Theme("winter", "white snow under a grey sky", (205, 210, 220), (245, 248, 250), 0.50,
          {"tree": "tree", "snowflake": "star", "cabin": "house", "sledge": "boat", "snowball": "disc"},
          ("blue", "white", "green", "brown"), _RING, ("SKI", "ICE"), "Every sound is swallowed by the cold"),
    Theme("sea floor", "dark green water over pale sand", (20, 95, 105), (205, 190, 140), 0.80,
          {"fish": "fish", "shell": "heart", "bubble": "ring", "coral": "flower", "starfish": "star"},
          ("orange", "pink", "yellow", "blue"), _RING, ("REEF", "DEEP"), "Light comes down in thin moving lines"),
    Theme("playground", "red rubber ground with a light blue sky", (175, 220, 245), (200, 95, 80), 0.70,
          {"ball": "disc", "kite": "diamond", "block": "square", "swing": "bar", "balloon": "heart"},
          ("blue", "yellow", "green", "purple"), _CORNERS, ("PLAY", "JUMP"), "The children have gone home for dinner"),
    Theme("workshop", "a dark bench against a brick wall", (150, 85, 65), (70, 60, 55), 0.60,
          {"gear": "ring", "nut": "hexagon", "box": "square", "wrench": "cross", "bolt": "bar"},
          ("black", "yellow", "white", "blue"), _LEFT, ("TOOLS", "FIX"), "The smell of oil hangs in the air"),
    Theme("festival", "purple evening light over a wide square", (95, 60, 140), (60, 45, 90), 0.75,
          {"lantern": "disc", "flag": "triangle", "drum": "square", "firework": "star", "mask": "crescent"},
          ("red", "yellow", "pink", "white"), _TOP, ("DANCE", "MUSIC"), "People sing until the morning comes"),
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One thing of a scene."""

    noun: str
    shape: str
    colour: str
    size: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """What is in one picture."""

    theme: Theme
    things: tuple[Thing, ...]
    word: str | None

    @property
    def contents(self) -> list[str]:
        """Return everything that can be recognised, as labels."""
        labels = {f"theme {self.theme.name}", f"count {len(self.things)}", f"word {self.word}"}
        for thing in self.things:
            labels |= {f"thing {thing.noun}", f"colour {thing.colour}", f"{thing.colour} {thing.noun}"}
            labels.add(f"{thing.noun} {PLACES[thing.cell]}")
        return sorted(labels)

    @property
    def is_validation(self) -> bool:
        """Split by content: about one combination of theme and coloured things in ten."""
        content = json.dumps([self.theme.name, sorted(f"{thing.colour} {thing.noun}" for thing in self.things)])
        return hashlib.sha256(content.encode()).digest()[0] < 26


def all_labels() -> list[str]:
    """Return every label that `Scene.contents` can hold, sorted."""
    nouns = {noun for theme in THEMES for noun in theme.things}
    words = {word for theme in THEMES for word in theme.words} | {None}
    labels = {f"theme {theme.name}" for theme in THEMES} | {f"count {count}" for count in NUMBERS}
    labels |= {f"word {word}" for word in words} | {f"thing {noun}" for noun in nouns}
    labels |= {f"colour {colour}" for colour in COLOURS} | {f"{c} {noun}" for c in COLOURS for noun in nouns}
    return sorted(labels | {f"{noun} {place}" for noun in nouns for place in PLACES.values()})


def make_scene(seed: int, index: int, *, validation: bool) -> Scene:
    """Make scene number `index` of the training or the validation split of the data set that `seed` names."""
    rng = random.Random(f"{seed}/{index}/{validation}")
    while True:
        scene = _random_scene(rng)
        if scene.is_validation == validation:
            return scene


def _random_scene(rng: random.Random) -> Scene:
    theme = rng.choice(THEMES)
    count = rng.choice((2, 3, 3, 4))
    nouns = _likely(rng, list(theme.things), count)
    usual, others = list(theme.cells), [cell for cell in PLACES if cell not in theme.cells]
    cells = [usual.pop(rng.randrange(len(usual))) if rng.random() < 0.75 else
             others.pop(rng.randrange(len(others))) for _ in range(count)]  # fmt: skip
    colours = [_likely(rng, list(theme.colours), 1)[0] if rng.random() < 0.85 else rng.choice(list(COLOURS))
               for _ in range(count)]  # fmt: skip
    things = tuple(
        Thing(noun, theme.things[noun], colour, rng.choice(list(SIZES)), cell)
        for noun, colour, cell in zip(nouns, colours, cells)
    )
    return Scene(theme, things, rng.choice(theme.words) if rng.random() < 0.3 else None)


def _likely(rng: random.Random, choices: list[str], count: int) -> list[str]:
    """Choose `count` different ones; each half as likely again as the next."""
    taken = []
    for _ in range(count):
        weights = [1.5 ** -i for i in range(len(choices))]  # fmt: skip
        taken.append(choices.pop(rng.choices(range(len(choices)), weights)[0]))
    return taken


def write_caption(scene: Scene, seed: int | str) -> str:
    """Write a dense caption of some 40 to 80 words: ground, every thing with size, colour, place and relation, the word."""
    rng = random.Random(f"{seed}/caption")
    opening = rng.choice(("This is a picture of a {}, with {}.", "We see a {} scene, with {}.", "A {} is shown: {}."))
    sentences = [opening.format(scene.theme.name, scene.theme.ground)]
    sentences.append(f"There are {NUMBERS[len(scene.things)]} things in it.")
    for number, thing in enumerate(scene.things):
        name = f"{thing.size} {thing.colour} {thing.noun}"
        if number in (0, 3):
            sentences.append(f"A {name} is {PLACES[thing.cell]}.")
        else:
            before = scene.things[number - 1]
            relation = _relation(thing.cell, before.cell)
            sentences.append(f"A {name} is {PLACES[thing.cell]}, {relation} the {before.colour} {before.noun}.")
    if scene.word:
        sentences.append(f"The word {scene.word} is written on it.")
    sentences.append(scene.theme.mood + ".")
    return " ".join(sentences)


def _relation(cell: tuple[int, int], other: tuple[int, int]) -> str:
    across, down = cell[0] - other[0], cell[1] - other[1]
    if abs(across) >= abs(down):
        return "to the right of" if across > 0 else "to the left of"
    return "below" if down > 0 else "above"


def write_questions(scene: Scene, seed: int | str) -> list[tuple[str, str]]:
    """Write questions with short answers, in a random order."""
    rng = random.Random(f"{seed}/questions")
    thing = rng.choice(scene.things)
    pairs = [
        ("What kind of scene is this?", scene.theme.name),
        ("How many things are there?", NUMBERS[len(scene.things)]),
        (f"What colour is the {thing.noun}?", thing.colour),
        (f"Where is the {thing.noun}?", PLACES[thing.cell]),
        ("Which word is written in the picture?", scene.word or "none"),
    ]
    rng.shuffle(pairs)
    return pairs


def write_text(scene: Scene, seed: int | str) -> str:
    """Write a text without a picture: what belongs to such a scene."""
    rng = random.Random(f"{seed}/text")
    things = rng.sample(list(scene.theme.things), 3)
    colour = rng.choice(scene.theme.colours)
    return (
        f"Pictures of the kind {scene.theme.name} often show a {things[0]}, a {things[1]} or a {things[2]}. "
        f"Many of these things are {colour}. {scene.theme.mood}."
    )


def render(scene: Scene, size: int, seed: int | str) -> Image.Image:
    """Render the picture, size x size pixels; `seed` jitters places and shades a little."""
    rng = random.Random(f"{seed}/render")
    scale = 2  # drawn twice as large and reduced, for smooth edges
    side = size * scale
    image = Image.new("RGB", (side, side), _shade(scene.theme.sky_colour, rng))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, scene.theme.horizon * side, side, side), fill=_shade(scene.theme.ground_colour, rng))
    for thing in scene.things:
        x, y = ((0.2 + 0.3 * c + rng.uniform(-0.03, 0.03)) * side for c in thing.cell)
        _draw_shape(draw, thing.shape, x, y, SIZES[thing.size] * side, _shade(COLOURS[thing.colour], rng))
    if scene.word:
        font = ImageFont.load_default(size=0.11 * side)
        draw.text((0.5 * side, 0.04 * side), scene.word, font=font, fill="white", anchor="mt",
                  stroke_width=2 * scale, stroke_fill="black")  # fmt: skip
    return image.resize((size, size), Image.Resampling.BOX)


def _shade(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, part + rng.randint(-8, 8))) for part in colour)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill) -> None:
    """Draw one shape about (x, y), r being half its width."""

    def polygon(*points):
        draw.polygon([(x + r * px, y + r * py) for px, py in points], fill=fill, outline="black")

    def ellipse(left, top, right, bottom, **colour):
        draw.ellipse((x + r * left, y + r * top, x + r * right, y + r * bottom), **(colour or {"fill": fill}))

    def wheel(corners, inner=1.0, turn=0.0):
        angles = [turn + math.pi * k / corners for k in range(2 * corners)]
        polygon(*((math.sin(a) * q, -math.cos(a) * q) for k, a in enumerate(angles) for q in [inner if k % 2 else 1]))

    if shape == "disc":
        ellipse(-1, -1, 1, 1, fill=fill, outline="black")
    elif shape == "ring":
        ellipse(-1, -1, 1, 1, outline=fill, width=max(2, int(r / 2.5)))
    elif shape == "crescent":
        polygon(*((math.cos(a), math.sin(a)) for a in [math.pi * k / 12 for k in range(6, 19)]),
                *((-0.45 * math.sin(a), -math.cos(a)) for a in [math.pi * k / 12 for k in range(12)]))  # fmt: skip
    elif shape == "square":
        polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    elif shape == "bar":
        polygon((-0.35, -1.2), (0.35, -1.2), (0.35, 1.2), (-0.35, 1.2))
    elif shape == "triangle":
        polygon((0, -1), (1, 0.9), (-1, 0.9))
    elif shape == "diamond":
        polygon((0, -1.2), (0.8, 0), (0, 1.2), (-0.8, 0))
    elif shape == "hexagon":
        wheel(3)
    elif shape == "star":
        wheel(5, inner=0.42)
    elif shape == "cross":
        polygon(*((px, py) for px, py in ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                                          (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3))))  # fmt: skip
    elif shape == "heart":
        ellipse(-1, -0.9, 0.1, 0.2)
        ellipse(-0.1, -0.9, 1, 0.2)
        polygon((-0.95, -0.15), (0.95, -0.15), (0, 1.1))
    elif shape == "house":
        polygon((-0.8, -0.1), (0.8, -0.1), (0.8, 1), (-0.8, 1))
        polygon((-1.1, -0.1), (1.1, -0.1), (0, -1.1))
    elif shape == "tree":
        draw.rectangle((x - 0.15 * r, y + 0.3 * r, x + 0.15 * r, y + 1.1 * r), fill=(95, 65, 40))
        polygon((0, -1.1), (0.85, 0.5), (-0.85, 0.5))
    elif shape == "boat":
        polygon((-1.1, 0.2), (1.1, 0.2), (0.6, 0.9), (-0.6, 0.9))
        polygon((0, -1), (0.7, 0.1), (0, 0.1))
    elif shape == "fish":
        ellipse(-1, -0.55, 0.6, 0.55, fill=fill, outline="black")
        polygon((0.4, 0), (1.1, -0.6), (1.1, 0.6))
    elif shape == "flower":
        for k in range(5):
            px, py = 0.6 * math.sin(k * 0.4 * math.pi), -0.6 * math.cos(k * 0.4 * math.pi)
            ellipse(px - 0.45, py - 0.45, px + 0.45, py + 0.45)
        ellipse(-0.3, -0.3, 0.3, 0.3, fill=(250, 240, 160))
    elif shape == "cup":
        ellipse(0.3, -0.4, 1.1, 0.5, outline=fill, width=max(2, int(r / 5)))
        polygon((-0.7, -0.8), (0.7, -0.8), (0.5, 0.9), (-0.5, 0.9))
    else:
        raise ValueError(f"no such shape: {shape}")
