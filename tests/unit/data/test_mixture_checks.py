"""A key of a mixture that nothing reads is an error, which names the place and what was meant."""

import shutil

import pytest

from rsa_megatron.data.dataset_checks import check_data

HEAD = "__module__: megatron.energon\n__class__: MetadatasetV2\n"


@pytest.mark.parametrize(
    "body, message",
    [
        (HEAD + "split: {}\nsplits: {train: {path: DATA}}", r"m.yaml: unknown key 'split'; did you mean 'splits'\?"),
        (
            HEAD + "splits: {train: {path: DATA, subflavor: {rsa: true}}}",
            r"splits: train \(captions\): unknown key 'subflavor'; did you mean 'subflavors'",
        ),
        (
            HEAD + "splits: {train: {blended: [{path: DATA}]}}",
            "splits: train: unknown key 'blended'; did you mean 'blend'",
        ),
        (
            HEAD + "splits: {train: {blend: [{path: DATA}, {wieght: 3, path: DATA}]}}",
            r"blend, entry 2 \(captions\): unknown key 'wieght'; did you mean 'weight'",
        ),
        (
            HEAD + "splits: {train: {blend: [{repetitions: 3, path: DATA}]}}",
            "unknown key 'repetitions'; it may have .*weight",
        ),
        (
            HEAD + "splits: {train: {blend_epochized: [{weight: 3, path: DATA}]}}",
            "unknown key 'weight'; it may have .*repetitions",
        ),
        (
            HEAD + "splits: {train: {path: DATA, aux: {image: 'filesystem:///tmp'}}}",
            "aux: unknown key 'image'; did you mean 'images'",
        ),
        (
            HEAD + "splits: {train: {path: DATA, subset: {rang: [0, 3]}}}",
            "subset: unknown key 'rang'; did you mean 'range'",
        ),
        (
            HEAD + "splits: {train: {path: DATA, subflavors: {RSA: true}}}",
            "subflavors: unknown key 'RSA'; did you mean 'rsa'",
        ),
        (
            HEAD + "splits: {train: {path: inner.yaml}}",
            r"inner.yaml, splits: train \(captions\): unknown key 'subflavours'; did you mean 'subflavors'",
        ),
        (
            HEAD + "splits: {training: {path: DATA}}",
            "m.yaml has no split part 'train', its splits are training: rename training to train",
        ),
        ("splits: {train: {blend: [{path: DATA}]}}", "needs `__class__: MetadatasetV2`"),
        (
            HEAD.replace("V2", "") + "splits: {train: {datasets: [{wieght: 3, path: DATA}]}}",
            "datasets, entry 1 .*'wieght'; did you mean 'weight'",
        ),
        (HEAD + "splits: {train: [", r"m.yaml is broken YAML, line \d, column \d+: "),
        (HEAD + "splits:\n  train: a: b", "m.yaml is broken YAML, line 4, column 11: mapping values are not allowed"),
        ("", "m.yaml is empty$"),
        ("# later\n", "m.yaml is empty$"),
        (HEAD + "splits: {train: {path: ./m.yaml}}", "m.yaml names itself: remove it"),
        (
            HEAD + "splits: {train: {blend: [{path: other.yaml}]}}",
            "m.yaml names itself, by way of .*other.yaml: remove it",
        ),
        (
            HEAD + "splits: {train: {blend: [{path: DATA, weight: x}]}}",
            "entry 1 .captions.: weight is 'x'; it must be a number",
        ),
        (
            HEAD + "splits: {train: {blend: [{path: DATA, weight: -1}]}}",
            "weight is -1; it must be a number, 0 or larger$",
        ),
        (
            HEAD + "splits: {train: {blend_epochized: [{path: DATA, repetitions: [2]}]}}",
            r"repetitions is \[2\]; it must be",
        ),
        (HEAD + "splits: {train: {path: broken}}", r"broken/.nv-meta/dataset.yaml is broken YAML, line 2, column 1: "),
    ],
)
def test_what_is_wrong_with_a_mixture_is_one_line(demo, tmp_path, capfd, body, message):
    data = str(demo / "data" / "captions")
    (tmp_path / "inner.yaml").write_text(HEAD + f"splits: {{train: {{path: {data}, subflavours: {{rsa: true}}}}}}")
    (tmp_path / "m.yaml").write_text(body.replace("DATA", data))
    (tmp_path / "other.yaml").write_text(HEAD + "splits: {train: {path: m.yaml}}")
    if "broken" in body:
        shutil.copytree(data, tmp_path / "broken")
        (tmp_path / "broken" / ".nv-meta" / "dataset.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=message) as refused:
        check_data(str(tmp_path / "m.yaml"), ["train"], num_readers=1, micro_batch_size=4)
    assert "\n" not in str(refused.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "train",
    [
        "{path: DATA, subflavors: {rsa: true, src: web, kind: captions}, split_part: train}",
        "{blend: [{path: DATA, weight: 3, subset: {range: [0%, 50%]}, shuffle_over_epochs_multiplier: 2}]}",
        "{blend: [{path: DATA, weight: 0.5}, {path: DATA, weight: 2}, {path: ./twice.yaml}, {path: twice.yaml}]}",
        "{blend_epochized: [{path: DATA, repetitions: 2}], subset: {range: [0%, 50%]}}",
    ],
)
def test_what_energon_knows_passes(demo, tmp_path, train):
    data = demo / "data" / "captions"
    (tmp_path / "twice.yaml").write_text(HEAD + f"splits: {{train: {{path: {data}}}}}")
    (tmp_path / "m.yaml").write_text(
        HEAD + f"splits: {{train: {train}}}".replace("DATA", str(demo / "data" / "captions"))
    )
    check_data(str(tmp_path / "m.yaml"), ["train"], num_readers=1, micro_batch_size=4)


def test_an_unknown_key_of_a_data_sets_own_file_is_one_line(tmp_path):
    from tests.support import broken_data

    broken_data.write(tmp_path / "data")
    settings = tmp_path / "data" / ".nv-meta" / "dataset.yaml"
    settings.write_text(settings.read_text() + "part_fliter: [json]\n")
    with pytest.raises(ValueError, match="split 'train': .*part_fliter") as refused:
        check_data(str(tmp_path / "data"), ["train"], num_readers=1, micro_batch_size=4)
    assert "\n" not in str(refused.value)
