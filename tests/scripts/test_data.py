"""People's data becomes shards or links that Energon reads back; a killed run ends as if it had not been; show shows."""

import io
import json
import multiprocessing
import os
import random
import re
import signal
import tarfile
import time

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from megatron.energon import WorkerConfig
from PIL import Image
from transformers import AutoTokenizer

from rsa_megatron.cli import data as data_command
from rsa_megatron.cli.show_sample import draw_tiles, mark_text
from rsa_megatron.data import conversation
from rsa_megatron.data.dataset_checks import check_data
from rsa_megatron.data.loaders import TrainLoader
from rsa_megatron.data.prepare.shard_writer import Lines
from rsa_megatron.data.raw_samples import stored_samples
from rsa_megatron.data.synthetic.tokenizer import train_tokenizer
from rsa_megatron.data.task_encoder import LlavaTaskEncoder
from rsa_megatron.data.tiles import ImageTiler
from tests.support import embedding_data

PROMPT = "<image>\nPlease generate detailed descriptions of the given image."


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["A red boat on the sea. What is it?", "Two pictures, one of a dog.", PROMPT], folder)
    return folder


def image_bytes(number, size=(30, 20), format="PNG") -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(number).randbytes(3 * size[0] * size[1])).save(out, format)
    return out.getvalue()


def turns(question, answer) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava_records(root, count=30) -> tuple[list[dict], dict]:
    """LLaVA's records of one, two and no images; and what must come out: id -> (images' bytes, conversations)."""
    (root / "images" / "sub.folder").mkdir(parents=True)
    records, expected = [], {}
    for n in range(count):
        names = [f"sub.folder/{n}.{i}.{'jpg' if i else 'png'}" for i in range(n % 3)]
        images = [image_bytes(100 * n + i, format="JPEG" if i else "PNG") for i in range(len(names))]
        for name, data in zip(names, images):
            (root / "images" / name).write_bytes(data)
        talk = turns("<image>" * len(names) + "\nWhat is it?", f"Number {n}, in Chinese 船.")
        image = {"image": names[0] if len(names) == 1 else names} if names else {}
        records.append({"id": f"some/id.{n}", "conversations": talk} | image)
        expected[f"some/id.{n}"] = (images, talk)
    return records, expected


def write_source(root, count=30):
    records, expected = llava_records(root, count)
    (root / "d.json").write_text(json.dumps(records))
    return root / "d.json", expected


def run(command, source, out, *flags):
    data_command.main([command, str(source), "--out", str(out), *map(str, flags)])


def contents(path, part) -> dict:
    """id -> (images' bytes in order, conversations), as Energon reads them."""
    found = {}
    for sample in stored_samples(path, part):
        record = sample.record if isinstance(sample.record, dict) else json.loads(sample.record)
        names = sorted(sample.images, key=lambda name: int(name.partition(".")[0]) if "." in name else 0)
        assert record["id"] not in found
        found[record["id"]] = ([sample.images[name] for name in names], record["conversations"])
    return found


def files(folder) -> dict[str, bytes]:
    """What the command itself has written; Energon's index has a random number in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_pack_and_link_give_back_every_byte_and_the_same_samples(tmp_path, capsys):
    source, expected = write_source(tmp_path)
    flags = ("--images", tmp_path / "images", "--val", 4, "--rsa")
    run("pack", source, tmp_path / "packed", *flags, "--shard-size", 8)
    run("link", source, tmp_path / "linked", *flags)
    packed, linked = tmp_path / "packed", tmp_path / "linked" / "mixture.yaml"
    of_all = (
        "    RSA: the 10 of 30 samples with exactly one image take part (--rsa); to keep them out, write rsa: false in"
    )
    said = capsys.readouterr().out
    assert f"{of_all} {packed}/.nv-meta/dataset.yaml, or" in said and f"{of_all} {linked}, or" in said
    for part, count in (("train", 26), ("val", 4)):
        actual = contents(packed, part)
        assert len(actual) == count and contents(linked, part) == actual
        assert all(actual[i] == expected[i] for i in actual)
    assert contents(packed, "train").keys() | contents(packed, "val").keys() == expected.keys()
    for path in (packed, linked):
        assert all(sample.__subflavors__ == {"rsa": True} for sample in stored_samples(path, "train"))
        check_data(str(path), ["train", "val"], num_readers=2, micro_batch_size=2)
    names = tarfile.open(packed / "train-00000.tar").getnames()
    assert len({name.partition(".")[0] for name in names}) == 8 and {
        "000001.png",
        "000002.0.png",
        "000002.1.jpg",
    } & set(names)
    first = json.loads((tmp_path / "linked" / "train.jsonl").read_text().splitlines()[0])
    assert list(first) == ["id", "image", "conversations"]
    summary = json.loads((packed / "summary.json").read_text())
    assert summary["parts"] == {"train": 26, "val": 4} and summary["skipped"] == {} and summary["shards"] == 5
    assert summary["histograms"]["images of a sample"] == {"0": 10, "1": 10, "2": 10}
    assert summary["histograms"]["tiles of an image"] == {"1": 20, "2": 10}  # images of two have no grid
    for folder in (packed, linked.parent):
        assert Image.open(folder / "summary.png").size[0] > 500 and not list(tmp_path.glob("*.unfinished"))


def test_captions_of_coco_and_of_tables_are_packed_and_linked(tmp_path, capsys):
    """What can be measured can be trained on: each image with its caption, byte for byte."""
    data = [image_bytes(n) for n in range(6)]
    (tmp_path / "images").mkdir()
    for n in range(6):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(data[n])
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(7)],  # the last is missing
        "annotations": [{"id": n, "image_id": n, "caption": f"Caption {n}."} for n in range(7)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,Caption {n}.\n" for n in range(6)))
    rows = [{"image": {"bytes": data[n], "path": None}, "caption": f"Caption {n}."} for n in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=4)
    expected = {f"Caption {n}.": [data[n]] for n in range(6)}
    for name, how in (
        ("coco.json", "pack"),
        ("coco.json", "link"),
        ("t.csv", "pack"),
        ("t.csv", "link"),
        ("t.parquet", "pack"),
    ):
        out = tmp_path / f"{how}-{name}"
        run(how, tmp_path / name, out, "--images", tmp_path / "images", "--val", 2, "--rsa")
        assert ("skipped: 1 whose image is not in" in capsys.readouterr().err) == (name == "coco.json")
        path = out / "mixture.yaml" if how == "link" else out
        found = {}
        for part, count in (("train", 4), ("val", 2)):
            samples = list(stored_samples(path, part))
            assert len(samples) == count
            for sample in samples:
                record = sample.record if isinstance(sample.record, dict) else json.loads(sample.record)
                human, answer = record["conversations"]
                assert human["value"].startswith("<image>\n") and answer["from"] == "gpt"
                found[answer["value"]] = list(sample.images.values())
        assert found == expected
    with pytest.raises(
        SystemExit,
        match="t.parquet, row group 0, row 0: its images are stored in the file itself, so link has nothing to point to: use pack",
    ):
        run("link", tmp_path / "t.parquet", tmp_path / "linked-parquet", "--val", 2)


def test_every_other_format_is_packed_with_its_bytes(tmp_path, capsys):
    data = [image_bytes(n) for n in range(6)]
    images = [{"bytes": data[n], "path": None} for n in range(6)]
    rows = [{"id": f"{n}", "image": images[n], "conversations": turns("What?", f"A {n}.")} for n in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=4)
    (tmp_path / "captions" / "deep").mkdir(parents=True)
    for n in range(6):
        (tmp_path / "captions" / "deep" / f"{n}.png").write_bytes(data[n])
        (tmp_path / "captions" / "deep" / f"{n}.txt").write_text(f"A {n}.")
    told = [turns("<image>\nWhat?", f"A {n}.") for n in range(6)]
    records = [{"id": f"{n}", "image": f"captions/deep/{n}.png", "conversations": told[n]} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: d.jsonl, sampling_strategy: 'end:50%'}]")
    run("pack", tmp_path / "d.parquet", tmp_path / "from-parquet", "--val", 0)
    assert contents(tmp_path / "from-parquet", "train") == {f"{n}": ([data[n]], told[n]) for n in range(6)}
    run("pack", tmp_path / "captions", tmp_path / "from-folder", "--val", 0)
    actual = contents(tmp_path / "from-folder", "train")
    assert actual == {f"deep/{n}": ([data[n]], turns(PROMPT, f"A {n}.")) for n in range(6)}
    assert next(stored_samples(tmp_path / "from-folder", "train")).__subflavors__ == {"rsa": False}
    run("link", tmp_path / "m.yaml", tmp_path / "from-yaml", "--val", 1)
    linked = tmp_path / "from-yaml" / "mixture.yaml"
    actual = contents(linked, "train") | contents(linked, "val")
    assert actual == {f"{n}": ([data[n]], told[n]) for n in (3, 4, 5)}
    with pytest.raises(SystemExit, match="d.parquet, row 0: its images are stored in the file itself.*use pack"):
        run("link", tmp_path / "d.parquet", tmp_path / "no")


@pytest.mark.parametrize("command", ["pack", "link"])
def test_training_reads_the_same_samples_from_both(command, tmp_path, tokenizer_folder):
    source, expected = write_source(tmp_path, 12)
    run(command, source, tmp_path / "out", "--images", tmp_path / "images", "--val", 0, "--rsa")
    encoder = LlavaTaskEncoder(
        AutoTokenizer.from_pretrained(tokenizer_folder),
        image_size=28,
        patch_size=14,
        max_sequence_length=256,
        template="plain",
        image_aspect_ratio="square",
        grid_pinpoints=[],
        max_tiles=1,
    )
    path = tmp_path / "out" if command == "pack" else tmp_path / "out" / "mixture.yaml"
    loader = TrainLoader(
        str(path), encoder, WorkerConfig(rank=0, world_size=1, num_workers=0), 4, shuffle_buffer_size=1
    )
    batches = [next(loader) for _ in range(3)]
    assert {record["id"] for batch in batches for record in batch.records} == expected.keys()
    assert sum(batch.num_skipped for batch in batches) == 0
    assert sum(batch.rsa.eligible.sum().item() for batch in batches) == 4  # those of one image
    assert sum(len(batch.images) for batch in batches) == 12


def test_what_is_left_out_is_listed_and_counted(tmp_path, capsys):
    source, expected = write_source(tmp_path, 9)
    records = json.loads(source.read_text())
    records[1]["image"] = "../d.json"
    (tmp_path / "images" / "sub.folder" / "4.0.png").write_bytes(b"")
    lines = [json.dumps(r) for r in records]
    lines[6] = lines[6][:-5]
    lines.append(lines[2])  # an id may repeat, and both are kept
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    run("pack", tmp_path / "d.jsonl", tmp_path / "out", "--images", tmp_path / "images", "--val", 0)
    kept = [json.loads(sample.record)["id"] for sample in stored_samples(tmp_path / "out", "train")]
    assert kept == [f"some/id.{n}" for n in (0, 2, 3, 5, 7, 8, 2)]
    keys = [sample.__key__ for sample in stored_samples(tmp_path / "out", "train")]
    assert keys == [f"{n:06d}" for n in (0, 2, 3, 5, 7, 8, 9)]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(s["record"], s["place"], s["id"], s["kind"]) for s in skipped] == [
        (1, "d.jsonl, line 2", "some/id.1", "outside of the image folder"),
        (4, "d.jsonl, line 5", "some/id.4", "unreadable image"),
        (6, "d.jsonl, line 7", None, "broken line"),
    ]
    assert skipped[1]["reason"] == "sub.folder/4.0.png is empty (0 bytes)"
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"] == {s["kind"]: 1 for s in skipped}
    said = capsys.readouterr().out
    assert "7 samples: 7 train, 0 val, in 1 shards; 3 skipped" in said
    dataset = tmp_path / "out" / ".nv-meta" / "dataset.yaml"
    offer = f"to let the 1 of 7 samples with exactly one image in, write rsa: true in {dataset}, or in a mixture"
    assert f"    RSA: no sample takes part (no --rsa); {offer}\n    train with" in said
    assert dataset.read_text().count("rsa: false") == 1
    assert "skipped  1 broken line: d.jsonl, line 7\n" in said and "1 unreadable image: some/id.4\n" in said


def heavy_source(root):
    """Sixty records, some unusable, whose pictures take a while to decode."""
    (root / "images").mkdir()
    for n in range(3):
        (root / "images" / f"{n}.png").write_bytes(image_bytes(n, (500, 500)))
    records = [{"id": n, "image": f"{n % 4}.png", "conversations": turns("<image>", f"A {n}.")} for n in range(60)]
    (root / "d.json").write_text(json.dumps(records))
    return root / "d.json"


@pytest.mark.parametrize("command", ["pack", "link"])
def test_a_killed_run_ends_as_one_that_was_not(command, tmp_path, monkeypatch):
    source = heavy_source(tmp_path)
    flags = ["--images", tmp_path / "images", "--val", 7]
    flags += ["--shard-size", 4] if command == "pack" else []
    # As on any other size of data, only sooner.
    monkeypatch.setattr(Lines.__init__, "__kwdefaults__", {"note_every": 4})
    run(command, source, tmp_path / "expected", *flags)
    unfinished = tmp_path / "out.unfinished"
    noted = 0
    for _ in range(3):
        child = multiprocessing.get_context("fork").Process(
            target=run, args=(command, source, tmp_path / "out", *flags)
        )
        child.start()
        deadline = time.monotonic() + 30
        while position(unfinished) <= noted and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not (tmp_path / "out").exists() and noted < position(unfinished) < 60
        noted = position(unfinished)
        for path in being_written(unfinished):
            with path.open("ab") as file:
                file.write(b"what came after the last position")
        (unfinished / "state.json.unfinished-1").write_text('{"half')  # killed while it noted its position
    run(command, source, tmp_path / "out", *flags)
    expected = files(tmp_path / "expected")
    assert files(tmp_path / "out") == expected and len(expected) > 4
    assert not unfinished.exists()


def being_written(folder) -> list:
    """The files that are not whole at the noted position, and a shard after it."""
    positions = json.loads((folder / "state.json").read_text())["positions"]
    shards = [(part, position["shard"]) for part, position in positions.items() if "shard" in position]
    tars = [folder / f"{part}-{shard + more:05d}.tar" for part, shard in shards for more in (0, 1)]
    return [*folder.glob("*.jsonl"), *tars]


def position(folder) -> int:
    try:
        return json.loads((folder / "state.json").read_text()).get("next", 0)
    except FileNotFoundError:
        return 0


def test_the_number_of_workers_does_not_matter_and_the_seed_does(tmp_path):
    source = heavy_source(tmp_path)
    for name, flags in {"one": ["--num-workers", 1], "five": ["--num-workers", 5], "other": ["--seed", 1]}.items():
        run("pack", source, tmp_path / name, "--images", tmp_path / "images", "--val", 0.2, "--shard-size", 16, *flags)
    assert files(tmp_path / "one") == files(tmp_path / "five")
    assert files(tmp_path / "one")["val-00000.tar"] != files(tmp_path / "other")["val-00000.tar"]


def test_what_is_finished_stays_and_other_settings_are_rejected(tmp_path, capsys):
    source, _ = write_source(tmp_path, 6)
    flags = ("--images", tmp_path / "images", "--val", 0)
    run("link", source, tmp_path / "out", *flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run("link", source, tmp_path / "out", *flags)
    assert "out: already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(SystemExit, match="out was started with rsa False, this run has True: name another --out"):
        run("link", source, tmp_path / "out", *flags, "--rsa")
    (tmp_path / "out").rename(tmp_path / "begun.unfinished")
    settings = json.loads((tmp_path / "begun.unfinished" / "summary.json").read_text())["settings"]
    (tmp_path / "begun.unfinished" / "state.json").write_text(
        json.dumps({"settings": settings, "figures": {"splits": {"train": 6}}})
    )
    with pytest.raises(SystemExit, match="begun.unfinished was started with val 0, this run has 2"):
        run("link", source, tmp_path / "begun", *flags[:2], "--val", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("!")
    with pytest.raises(SystemExit, match="mine already exists and was not written by this command"):
        run("link", source, tmp_path / "mine", *flags)


def test_flags_that_left_no_sample_may_be_corrected(tmp_path):
    write_source(tmp_path, 6)
    image = next(path for path in (tmp_path / "images").rglob("*") if path.is_file())
    name = str(image.relative_to(tmp_path / "images"))
    source = tmp_path / "captions.json"
    source.write_text(json.dumps([{"image": name, "caption": "a cat"}] * 4))
    for wrong in (tmp_path / "empty", tmp_path / "elsewhere"):
        wrong.mkdir()
        with pytest.raises(SystemExit, match="no sample for training can be used.*missing image"):
            run("pack", source, tmp_path / "out", "--images", wrong, "--val", 0)
    run("pack", source, tmp_path / "out", "--images", tmp_path / "images", "--val", 0)
    assert not (tmp_path / "out.unfinished").exists() and not (tmp_path / "out" / "skipped.jsonl").read_text()


def test_tars_that_are_there_are_indexed_unasked_by_the_command_that_pack_names(tmp_path):
    from click.testing import CliRunner
    from megatron.energon.tools.prepare import command

    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"a cat"))
    with pytest.raises(SystemExit, match="once they are indexed: `energon prepare ") as end:
        run("pack", tmp_path, tmp_path / "out")
    words = re.search("`(.*)`", str(end.value))[1].split()
    done = CliRunner().invoke(command, words[2:], input="")
    assert done.exit_code == 0, done.output
    parts = yaml.safe_load((tmp_path / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    assert (parts["train"], parts["val"]) == (["00000.tar"], ["00001.tar"])
    with pytest.raises(SystemExit, match="is a prepared data set: --data-path"):
        run("pack", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--val", "1.5"], "--val 1.5 is neither"),
        (["--val", "-1"], "--val -1 is neither"),
        (["--val", "6"], "--val 6 leaves nothing of 6 samples"),
        (["--images", "nowhere"], "--images .*nowhere is not a folder"),
        (["--tokenizer", "nowhere"], "--tokenizer nowhere is not a folder"),
        ([], r"no sample for training can be used \(\d missing image"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, message):
    source, _ = write_source(tmp_path, 6)
    records = [r for r in json.loads(source.read_text()) if r.get("image")] * 2
    source.write_text(json.dumps(records[:6]))
    with pytest.raises(SystemExit, match=message):
        run("pack", source, tmp_path / "out", *(["--val", "0"] if "--val" not in flags else []), *flags)
    assert not (tmp_path / "out").exists()


def test_show_marks_what_is_learnt_and_draws_the_tiles(tmp_path, tokenizer_folder, capsys):
    (tmp_path / "a.png").write_bytes(image_bytes(0, (90, 60)))
    talk = turns("<image>\nWhat is it?", "A red boat.")
    records = [{"id": n, "image": "a.png", "conversations": talk} for n in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run("pack", tmp_path / "d.jsonl", tmp_path / "packed", "--rsa", "--val", 0, "--tokenizer", tokenizer_folder)
    run("link", tmp_path / "d.jsonl", tmp_path / "linked", "--val", 0)
    show = ["--index", 2, "--tokenizer", tokenizer_folder, "--image-size", 28, "--out", tmp_path / "sample.png"]
    assert "tokens of text" in json.loads((tmp_path / "packed" / "summary.json").read_text())["histograms"]
    for path, rsa in (
        (tmp_path / "d.jsonl", "no, stage 2 trains without it"),
        (tmp_path / "packed", "no, stage 2 trains without it"),
        (tmp_path / "linked" / "mixture.yaml", "no, its dataset has no subflavor rsa: true"),
    ):
        capsys.readouterr()
        data_command.main([*map(str, ["show", path, *show, "--stage", "2", "--label-style", "answer_only"])])
        printed = capsys.readouterr().out
        assert "What is it?<|im_end|>\n<|im_start|>assistant\n«‹A red boat.›<|im_end|>»" in printed
        assert f"RSA: {rsa}" in printed and "id 2" in printed and "tokens, of which" in printed
        assert "image of 90 x 60 pixels: a base tile and a grid of 3 x 4 (rows x columns)" in printed
        drawn = Image.open(tmp_path / "sample.png")
        assert drawn.size == (5 * 34 + 6, 3 * 34 + 6)
        (tmp_path / "sample.png").unlink()
    data_command.main([*map(str, ["show", tmp_path / "packed", *show])])
    printed = capsys.readouterr().out
    assert "<image>«‹A red boat.›↵\n»" in printed and "RSA: yes\n" in printed
    data_command.main([*map(str, ["show", tmp_path / "d.jsonl", *show])])
    assert "RSA: yes, if it is packed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--index 7: .*packed has 3 samples in its split train"):
        data_command.main([*map(str, ["show", tmp_path / "packed", *show, "--index", 7])])
    with pytest.raises(SystemExit, match="--index 3: .*d.jsonl has 3 samples"):
        data_command.main([*map(str, ["show", tmp_path / "d.jsonl", *show, "--index", 3])])


def test_show_says_what_an_embedding_is(demo, tmp_path, capsys):
    shards = embedding_data.write_shards(demo / "data" / "captions", tmp_path / "shards", 20, keep_images=True)
    show = ["--tokenizer", demo / "tokenizer", "--image-size", 28, "--out", tmp_path / "sample.png"]
    data_command.main([*map(str, ["show", shards, *show, "--stage", "revision"])])
    printed = capsys.readouterr().out
    assert (
        "image as an embedding: 20 numbers, of length 1, in 576 position(s)" in printed
        and "RSA: no, stage revision trains without it" in printed
    )
    assert not (tmp_path / "sample.png").exists()
    data_command.main([*map(str, ["show", shards, *show, "--stage", "1"])])  # of the same sample the pixels
    printed = capsys.readouterr().out
    assert "image of 112 x 112 pixels: a base tile only" in printed
    assert "tiles of 28 pixels, patches of 14: of llava-ov-7b; --model names another" in printed
    data_command.main([*map(str, ["show", shards, *show[:2], *show[4:], "--stage", "2", "--model", "demo"])])
    printed = capsys.readouterr().out
    assert "a base tile and a grid of 2 x 2 (rows x columns)" in printed  # as its own grids say
    assert "of demo; --model names another" in printed
    with pytest.raises(SystemExit, match=r"sample 0 has no embedding \(.npy\), which stage revision reads"):
        data_command.main([*map(str, ["show", demo / "data" / "captions", *show, "--stage", "revision"])])


def test_the_tiles_lie_in_the_picture_as_in_the_image():
    # Left red, right blue: the base tile and the grid's columns must say so.
    image = Image.new("RGB", (56, 28), "red")
    image.paste("blue", (28, 0, 56, 28))
    tiler = ImageTiler(image_size=28, image_aspect_ratio="anyres", grid_pinpoints=[(28, 56)])
    drawn = draw_tiles(tiler.tiles([image]), tiler.layouts([image]))
    assert drawn.size == (3 * 34 + 6, 34 + 6)
    middles = [drawn.getpixel((6 + 34 * column + 14, 20)) for column in (1, 2)]
    assert middles == [(255, 0, 0), (0, 0, 255)]
    assert drawn.getpixel((8, 20)) == (255, 0, 0) and drawn.getpixel((31, 20)) == (0, 0, 255)
    assert drawn.getpixel((2, 2)) == (255, 255, 255)


def test_colour_is_added_to_the_marks(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = conversation.encode(tokenizer, turns("<image>", "A red boat."), "plain")
    coloured, plain = (mark_text(tokenizer, text, colour=colour) for colour in (True, False))
    assert "\033[32m«" in coloured and "\033[4m‹" in coloured and "\033" not in plain
    for code in ("\033[32m", "\033[4m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain


def test_a_link_is_a_mixture_that_names_the_folder_of_images(tmp_path):
    source, _ = write_source(tmp_path, 6)
    run("link", source, tmp_path / "out", "--images", tmp_path / "images", "--val", 0.34, "--rsa")
    mixture = yaml.safe_load((tmp_path / "out" / "mixture.yaml").read_text())
    assert mixture["splits"]["train"] == {
        "path": "train.jsonl",
        "subflavors": {"rsa": True},
        "aux": {"images": f"filesystem://{(tmp_path / 'images').resolve()}"},
    }
    assert len((tmp_path / "out" / "val.jsonl").read_text().splitlines()) == 2
