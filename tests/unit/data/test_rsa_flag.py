"""What says that a data set takes part in RSA, wherever it stands; and what a run without any is told."""

import re
from pathlib import Path

import pytest
import yaml

from rsa_megatron.data.dataset_checks import check_rsa_flags
from rsa_megatron.data.raw_samples import stored_samples
from rsa_megatron.data.rsa_flag import read_rsa_flag

RSA_OFF = r"RSA is on \(--rsa-weight 0.01\), but no data set takes part in it: "


def write_mixture(folder, train: dict) -> str:
    folder.mkdir(exist_ok=True)
    mixture = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": train}}
    (folder / "m.yaml").write_text(yaml.safe_dump(mixture))
    return str(folder / "m.yaml")


def blend(demo, **flags) -> dict:
    """The demo's data sets, each with the flag in the mixture; None: without, so that its own counts."""
    return {
        "blend": [
            {"path": str(demo / "data" / kind), "weight": 1} | ({} if flag is None else {"subflavors": {"rsa": flag}})
            for kind, flag in flags.items()
        ]
    }


# The demo's captions are packed with `rsa: true`, its questions with `rsa: false`.
FLAGS = [
    (dict(captions=None), True),
    (dict(questions=None, captions=None), True),
    (dict(questions=None), False),
    (dict(questions=True), True),
    (dict(captions=False, questions=None), False),
    (dict(captions=False, questions="Yes"), True),
    (dict(captions="false", questions="no"), False),
]


@pytest.mark.parametrize("flags, takes_part", FLAGS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_mixture_takes_part_if_a_data_set_of_it_does(demo, tmp_path, flags, takes_part, nested):
    path = write_mixture(tmp_path, blend(demo, **flags))
    if nested:
        path = write_mixture(tmp_path / "outer", {"blend": [{"path": path, "weight": 1}]})
    elif len(flags) > 1:
        # What the samples themselves carry, which the task encoder reads.
        carried = {read_rsa_flag(sample.__subflavors__, default=False) for sample in stored_samples(path, "train")}
        assert takes_part == (True in carried)
    check_rsa_flags(path, rsa_weight=0)
    if takes_part:
        check_rsa_flags(path, rsa_weight=0.01)
        return
    with pytest.raises(ValueError) as refused:
        check_rsa_flags(path, rsa_weight=0.01)
    named = ", ".join(rf"{kind} \(rsa: false\)" for kind in flags)
    remedy = f"; give those of image-caption pairs `subflavors: {{rsa: true}}` in {path}, or turn RSA off"
    assert re.fullmatch(f"--data-path {path}: {RSA_OFF}{named}{remedy}.*", str(refused.value))


def test_an_outer_mixture_and_a_weight_of_0_can_turn_it_off(demo, tmp_path):
    inner = write_mixture(tmp_path, blend(demo, captions=True))
    off = {"path": inner, "weight": 1, "subflavors": {"rsa": False}}
    with pytest.raises(ValueError, match=RSA_OFF + r"captions \(rsa: false\);"):
        check_rsa_flags(write_mixture(tmp_path / "off", {"blend": [off]}), rsa_weight=0.01)
    unread = blend(demo, captions=True, questions=False)
    unread["blend"][0]["weight"] = 0
    with pytest.raises(ValueError, match=RSA_OFF + r"captions \(rsa: true, but weight 0\), questions"):
        check_rsa_flags(write_mixture(tmp_path / "unread", unread), rsa_weight=0.01)


def test_a_data_set_alone_is_told_which_file_to_change(demo, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (demo / "data" / "captions").iterdir():
        if path.name != ".nv-meta":
            (packed / path.name).symlink_to(path)
    (packed / ".nv-meta").mkdir()
    for path in (demo / "data" / "captions" / ".nv-meta").iterdir():
        (packed / ".nv-meta" / path.name).write_bytes(path.read_bytes())
    settings = yaml.safe_load((packed / ".nv-meta" / "dataset.yaml").read_text())
    for subflavors, found in (({}, "no rsa"), ({"rsa": False}, "rsa: false")):
        (packed / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings | {"subflavors": subflavors}))
        with pytest.raises(ValueError) as refused:
            check_rsa_flags(f"{packed}/", rsa_weight=0.01)
        assert re.search(RSA_OFF + rf"packed \({found}\); write `subflavors: ", str(refused.value))
        assert f"in {packed}/.nv-meta/dataset.yaml (rsa-megatron data pack --rsa does)" in str(refused.value)
    # As it says.
    (packed / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(settings | {"subflavors": {"rsa": True}}))
    check_rsa_flags(str(packed), rsa_weight=0.01)


def test_of_many_data_sets_five_are_named(demo, tmp_path):
    many = {"blend": [{"path": str(demo / "data" / "questions"), "weight": 1} for _ in range(7)]}
    with pytest.raises(ValueError, match=RSA_OFF + r"(questions \(rsa: false\)(, )?){5} and 2 more; give"):
        check_rsa_flags(write_mixture(tmp_path, many), rsa_weight=0.01)


@pytest.mark.parametrize("flag", ["maybe", 1, None, []])
def test_a_flag_that_says_neither_is_refused_with_rsa_and_without(demo, tmp_path, flag):
    path = write_mixture(tmp_path, blend(demo, captions=True))
    content = yaml.safe_load(Path(path).read_text())
    content["splits"]["train"]["blend"][0]["subflavors"] = {"rsa": flag}
    Path(path).write_text(yaml.safe_dump(content))
    for weight in (0, 0.01):
        with pytest.raises(
            ValueError, match=r"m.yaml, captions: its data set's subflavor rsa is .*; it must be true or f"
        ):
            check_rsa_flags(path, rsa_weight=weight)


@pytest.mark.parametrize("default", [True, False])
def test_without_a_flag_the_default_counts(default):
    assert read_rsa_flag(None, default=default) is read_rsa_flag({"kind": "x"}, default=default) is default
