"""Image-caption pairs of every form of file are recognised, with the right caption, rows and image; faults are named."""

import base64
import csv
import gzip
import json
import pickle
import sys
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rsa_megatron.data.sources.captions_only import open_captions
from rsa_megatron.data.sources.open_pairs import format_counts, open_pairs, sample
from tests.support.pictures import captions, conversation, images, picture, table, widths


def coco(folder, **changes):
    """Annotations out of order, as in COCO's own files; image 9 has none, of image 7 the first is empty."""
    content = {
        "info": {},
        "licenses": [],
        "images": [{"id": 42, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "c.jpg"}],
        "annotations": [
            {"id": 31, "image_id": 42, "caption": "The later one."},
            {"id": 4, "image_id": 42, "caption": "The earlier one. \n"},
            {"id": 1, "image_id": 7, "caption": " "},
            {"id": 2, "image_id": 7, "caption": "Seven."},
        ],
    } | changes
    path = folder / "captions_val.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_gives_each_image_its_caption_of_lowest_annotation_id(tmp_path):
    images(tmp_path / "val", ["b.jpg", "a.jpg", "c.jpg"])
    path = coco(tmp_path)
    pairs = open_pairs(path, images=tmp_path / "val")
    assert captions(pairs) == {"42": "The earlier one.", "7": "Seven."}
    assert widths(pairs) == [1, 2] and pairs[0].image().mode == "RGB"
    assert pairs.left_out == {"without a caption": 1}
    # Control: platonic-rep's rule, the first of the list, is another caption here.
    first_of_list = next(a["caption"] for a in json.loads(path.read_text())["annotations"] if a["image_id"] == 42)
    assert first_of_list == "The later one." != captions(pairs)["42"]


def test_images_that_are_not_there_or_lead_out_are_counted_with_the_remedy(tmp_path):
    images(tmp_path / "val", ["a.jpg"])
    images(tmp_path, ["outside.jpg"])
    (tmp_path / "val" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    names = ["a.jpg", "none.jpg", "../outside.jpg", str(tmp_path / "outside.jpg"), "link.jpg", "x" * 5000, "zero\0.jpg"]
    entries = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    told = [{"id": number, "image_id": number, "caption": f"Number {number}."} for number in range(len(names))]
    pairs = open_pairs(coco(tmp_path, images=entries, annotations=told), images=tmp_path / "val")
    root = (tmp_path / "val").resolve()
    assert captions(pairs) == {"0": "Number 0.", "4": "Number 4."}  # a link in the folder is followed
    assert pairs.left_out == {
        f"whose image is not in {root} (--images, of realign --image-folder, names the folder; nothing is downloaded)": 3,
        f"whose image's path leads out of {root}": 2,
    }
    assert format_counts(pairs.left_out).startswith("3 whose image is not in")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"annotations": None},
            "captions_val.json has no list 'annotations', its keys are info, licenses, images, annotations",
        ),
        ({"images": 3}, "has no list 'images'"),
        (
            {"annotations": [{"id": 1, "image_id": 7, "bbox": []}]},
            "an entry has no 'caption'; name COCO's captions_.*, not instances_",
        ),
        ({"annotations": [{"image_id": 7, "caption": "x"}]}, "an entry has no 'id'"),
        ({"images": [{"id": 7}]}, "an entry has no 'file_name'"),
        ({"annotations": ["x"]}, "is not a COCO captions file"),
        ({"annotations": []}, "no image with a caption found: 3 without a caption"),
    ],
)
def test_a_json_that_is_not_cocos_captions_is_named(tmp_path, changes, message):
    images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(ValueError, match=message):
        open_pairs(coco(tmp_path, **changes))


def test_an_image_without_a_caption_costs_no_other(tmp_path):
    images(tmp_path, ["b.jpg", "a.jpg", "c.jpg"])
    told = [{"id": 1, "image_id": 42, "caption": None}, {"id": 2, "image_id": 7, "caption": "Seven."}, {"id": 3}]
    pairs = open_pairs(coco(tmp_path, annotations=told))
    assert captions(pairs) == {"7": "Seven."} and pairs.left_out == {"without a caption": 2}
    entries = [
        {"filename": "b.jpg"},
        {"filename": "a.jpg", "sentences": [{"raw": "A."}]},
        {"filename": "c.jpg", "sentences": None},
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    pairs = open_pairs(tmp_path / "dataset.json")
    assert captions(pairs) == {"1": "A."} and pairs.left_out == {"without a caption": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [*entries, 7]}))
    with pytest.raises(ValueError, match="image 3 of Karpathy's JSON has no filename; it is 7"):
        open_pairs(tmp_path / "dataset.json")


def test_a_broken_json_is_named(tmp_path):
    path = coco(tmp_path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="captions_val.json is broken JSON: .*fetch it again"):
        open_pairs(path)
    path.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="captions_val.json is JSON too deep to be records or captions"):
        open_pairs(path)


def karpathy(folder):
    """As the file of that name has it: JSON with doubled quotation marks, split, other columns around."""
    rows = [
        (["Two men in green shirts .", "Second ."], "train", "1.jpg"),
        (['A dog says "woof" .', "B"], "val", "2.jpg"),
        (["A child , climbing .", "B"], "val", "3.jpg"),
        (["Test .", "B"], "test", "4.jpg"),
        (["", "The second is there ."], "val", "5.jpg"),
    ]
    path = folder / "flickr_annotations_30k.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for number, (raw, split, name) in enumerate(rows):
            writer.writerow([json.dumps(raw), "[0, 1]", split, name, number])
    images(folder / "flickr30k-images", [name for *_, name in rows])
    return path


def test_karpathys_csv_gives_a_splits_first_sentences(tmp_path):
    path, folder = karpathy(tmp_path), tmp_path / "flickr30k-images"
    pairs = open_pairs(path, images=folder)
    expected = {"2.jpg": 'A dog says "woof" .', "3.jpg": "A child , climbing .", "5.jpg": "The second is there ."}
    assert captions(pairs) == expected
    assert widths(pairs) == [2, 3, 5]
    assert list(pairs.left_out) == ["of another split than 'val' (--split selects it; found: train (1), test (1))"]
    assert captions(open_pairs(path, images=folder, split="test")) == {"4.jpg": "Test ."}
    with pytest.raises(
        ValueError, match=r"5 of another split than 'dev' \(--split selects it; found: val \(3\), train"
    ):
        open_pairs(path, images=folder, split="dev")


def test_kaggles_csv_gives_an_images_first_comment(tmp_path):
    lines = [
        "image_name| comment_number| comment",
        "1.jpg| 0| Two young guys .",
        "1.jpg| 1| Another .",
        '2.jpg| 0| He said " hello .',
        "2.jpg| 1| A | between .",
        "3.jpg| 0| A | between .",
        "3.jpg| 4   A dog runs across the grass .",
        "",
        "4.jpg| 4   Its second bar is lost .",
        "5.jpg| 0| Gone .",
    ]
    path = tmp_path / "results.csv"
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    images(tmp_path / "flickr30k_images", ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    pairs = open_pairs(path, images=tmp_path / "flickr30k_images")
    assert captions(pairs) == {"1.jpg": "Two young guys .", "2.jpg": 'He said " hello .', "3.jpg": "A | between ."}
    assert sorted(pairs.left_out.values()) == [
        1,
        1,
        3,
    ]  # a bar is lost, an image is, and three are others' second captions
    assert pairs.left_out["without a caption"] == 1 and pairs.left_out["of an image that has a caption already"] == 3


WIT = ["language", "page_url", "image_url", "page_title", "caption_reference_description", "context_page_description"]


def wit_rows() -> list[dict]:
    def row(language, name, caption):
        address = f"https://upload.wikimedia.org/wikipedia/commons/4/44/{name}"
        return dict(
            zip(WIT, (language, f"https://{language}.wikipedia.org/wiki/X", address, "X", caption, "long " * 40_000))
        )

    return [
        row("de", "Tour_%28Paris%29.jpg", "Der Turm."),
        row("en", "Tour_%28Paris%29.jpg", 'The "tower"\nof Paris.'),
        row("en", "Tour_%28Paris%29.jpg", "A second page's."),
        row("en", "No_words.jpg", ""),
        row("en", "Far_away.jpg", "Not here."),
        row("en", "B.jpg", "B."),
    ]


def write_tsv(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, WIT, delimiter="\t")
        writer.writeheader()
        writer.writerows(wit_rows())
    return path


@pytest.mark.parametrize("name", ["wit.tsv", "wit_v1.train.tsv.gz", "wit.parquet"])
def test_wikipedias_rows_are_those_of_the_language_whose_image_is_here(tmp_path, name):
    images(tmp_path / "images", ["Tour_(Paris).jpg", "B.jpg"])
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wit_rows()), path)
    else:
        write_tsv(path)
    before = csv.field_size_limit()
    pairs = open_pairs(path, images=tmp_path / "images")
    folder = "https://upload.wikimedia.org/wikipedia/commons/4/44"
    tower = f"{folder}/Tour_%28Paris%29.jpg"
    assert captions(pairs) == {tower: 'The "tower"\nof Paris.', f"{folder}/B.jpg": "B."}
    assert widths(pairs) == [1, 2]
    assert csv.field_size_limit() == before < len(wit_rows()[0]["context_page_description"])  # as it was, and too low
    assert pairs.left_out == {
        f"whose image is not in {tmp_path.resolve() / 'images'} (--images, of realign --image-folder, names the folder; nothing is downloaded)": 1,
        "without a caption": 1,
        "of an image that has a caption already": 1,
        "of another language than 'en' (--language-code selects it; found: de (1))": 1,
    }
    # Control: another language gives the same image another caption.
    assert captions(open_pairs(path, images=tmp_path / "images", language="de")) == {tower: "Der Turm."}
    with pytest.raises(
        ValueError, match=r"6 of another language than 'fr' \(--language-code selects it; found: en \(5\), de \(1\)\)"
    ):
        open_pairs(path, images=tmp_path / "images", language="fr")


def test_parquet_with_images_within(tmp_path):
    for part in range(2):
        (tmp_path / f"part{part}").mkdir()
        images = [{"bytes": picture(4 * part + n), "path": "same.jpg"} for n in range(4)]
        rows = [{"image": image, "text": [f"First {part}{n}.", "Second."]} for n, image in enumerate(images)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / f"part{part}" / "0.parquet", row_group_size=3
        )
    pairs = open_pairs(tmp_path)
    assert [pair.caption for pair in pairs] == [f"First {part}{n}." for part in range(2) for n in range(4)]
    assert widths(pairs) == [*range(1, 9)] and len(set(pairs.keys)) == 8
    assert [pairs[i].image().width for i in (7, 0, 5)] == [8, 1, 6]  # in any order


def test_parquet_takes_bytes_paths_and_wikimedias_nested_texts(tmp_path):
    images(tmp_path, ["x.jpg", "y.jpg"])
    rows = [
        {"image": {"bytes": None, "path": "y.jpg"}, "caption": "A path.", "filename": "one", "split": "val"},
        {"image": {"bytes": picture(30), "path": None}, "caption": "Bytes.", "filename": "two", "split": "val"},
        {"image": {"bytes": None, "path": "z.jpg"}, "caption": "Nothing.", "filename": "three", "split": "val"},
        {"image": {"bytes": picture(31), "path": None}, "caption": "Train.", "filename": "four", "split": "train"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "flickr.parquet")
    pairs = open_pairs(tmp_path / "flickr.parquet")
    assert pairs.keys == ["one", "two", "three"] and widths(pairs[i] for i in range(2)) == [2, 31]
    with pytest.raises(
        ValueError, match="flickr.parquet, row group 0, row 2: it has no image of its own, and its path z.jpg"
    ):
        pairs[2].image()
    features = {"language": ["de", "en"], "caption_reference_description": ["Haus", "House"]}
    as_list = [dict(zip(features, values)) for values in zip(*features.values())]
    for nested in (features, as_list):
        rows = [{"image": picture(5), "image_url": "http://a/b/House.jpg", "wit_features": nested}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "wit.parquet")
        pairs = open_pairs(tmp_path / "wit.parquet")
        assert captions(pairs) == {"http://a/b/House.jpg": "House"} and widths(pairs) == [6]


def test_a_parquets_column_of_no_image_or_of_several_is_counted(tmp_path):
    images(tmp_path, ["a.png", "b.png"])
    write = partial(pyarrow.parquet.write_table, where=tmp_path / "d.parquet")
    write(pyarrow.table({"image": [1, 2], "caption": ["A", "B"]}))
    with pytest.raises(ValueError, match=r"2 that cannot be used \(wrong type\)"):
        open_pairs(tmp_path / "d.parquet")
    write(pyarrow.table({"images": [["a.png", "b.png"], ["b.png"]], "caption": ["A", "B"], "prompt": [None, ""]}))
    pairs = open_pairs(tmp_path / "d.parquet")
    assert captions(pairs) == {"b.png": "B"} and pairs.left_out == {"that have no image, or several": 1}
    # A row's own image counts, whatever else names.
    write(pyarrow.table({"image": [picture(3)], "file": [7], "caption": ["A"]}))
    assert widths(open_pairs(tmp_path / "d.parquet")) == [4]


def test_what_a_tables_column_of_addresses_holds_is_told_from_an_address(tmp_path):
    """Widths tell which picture is taken: below sub/ they are others than those of the same name above."""
    images(tmp_path, ["a.png", "b.png", "sub/a.png", "sub/b.png"])
    data = "data:image/png;base64," + base64.b64encode(picture(9)).decode()
    told = ["sub/a.png", "sub/b.png", data, "https://a.org/x/a.png"]
    text = "".join(f'"{name}",Number {n}.\n' for n, name in enumerate(told))
    (tmp_path / "d.csv").write_text("image_url,caption\n" + text)
    pairs = open_pairs(tmp_path / "d.csv")
    assert pairs.keys == ["sub/a.png", "sub/b.png", "d.csv, line 4", "https://a.org/x/a.png"]
    assert widths(pairs) == [3, 4, 10, 1] and not pairs.left_out
    # Of two addresses that end alike nobody knows whose the file is.
    text += "https://a.org/y/a.png,Another.\nhttps://a.org/x/a.png,Second.\n"
    (tmp_path / "d.csv").write_text("image_url,caption\n" + text)
    pairs = open_pairs(tmp_path / "d.csv")
    assert widths(pairs) == [3, 4, 10]
    assert pairs.left_out == {
        "whose address ends in the same name as another's: the file of that name may be of either": 2,
        "of an image that has a caption already": 1,
    }
    assert len(open_captions(tmp_path / "d.csv")) == 5


def test_a_tables_image_is_that_of_the_column_that_a_record_gives(tmp_path):
    images(tmp_path, ["x/a.png", "y/a.png", "z/a.png"])
    row = {"file_name": "x/a.png", "caption": "A boat.", "image_path": "y/a.png", "image": "z/a.png"}
    for name in ("d.csv", "d.jsonl"):
        (tmp_path / name).write_text(
            json.dumps(row) if name == "d.jsonl" else "\n".join(",".join(cells) for cells in (row, row.values()))
        )
        assert widths(open_pairs(tmp_path / name)) == [3]
    (tmp_path / "d.csv").write_text("file_name,caption,image_path,image,label\nx/a.png,A boat.,y/a.png,,3\n")
    assert widths(open_pairs(tmp_path / "d.csv")) == [2]  # the first that is filled


def test_a_table_with_conversations(tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
    image = {"bytes": picture(2), "path": None}
    rows = [{"image": image, "conversations": talk}, {"image": image, "conversations": talk[:1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    pairs = open_pairs(tmp_path / "d.parquet")
    assert [pair.caption for pair in pairs] == ["A boat."] and pairs.left_out == {"without a caption": 1}


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "rsa_megatron.data.sources.pair_parquet", raising=False)
    with pytest.raises(ValueError, match="a.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        open_pairs(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            b"id,label\n1,x\n",
            r"no column of captions \(conversations, .*caption_reference_description, .*its columns are id, label; rename",
        ),
        (
            "a.csv",
            b"caption,label\n1,x\n",
            r"no column that names images \(image, .*its columns are caption, label; rename",
        ),
        ("a.csv", b"", "a.csv has no column of captions"),
        ("a.csv", b"image,caption\n", "a.csv: no image with a caption found; name"),
        ("a.csv", b"filename,raw\na.png,no list\n", "1 whose column raw cannot be read"),
        ("a.csv", b"filename,caption\n,x\n", "1 that name no image"),
        ("a.csv", b"filename,caption\na.png,N\xfcmber\n", "1 whose caption is not UTF-8"),
        (
            "a.csv",
            b"filename,caption\nnone.png,x\n",
            r"1 whose image is not in .* \(--images, of realign --image-folder, names the folder; nothing is downloaded\)",
        ),
        (
            "a.csv",
            b'filename,caption\na.png,"' + b"x" * (1 << 24) + b"\n",
            "a.csv, line 2: field larger .*a quotation mark there",
        ),
        (
            "a.tsv.gz",
            gzip.compress(b"filename\tcaption\n" * 100, mtime=0)[:30],
            "a.tsv.gz is truncated or broken: .*fetch it again",
        ),
        ("a.tsv.gz", b"filename\tcaption\n", "a.tsv.gz is truncated or broken: .*fetch it again"),
        (
            "a.tsv",
            b"index\tquestion\tA\tB\tanswer\timage\tcomment\n0\tWhich?\tx\ty\tA\ta.png\tlooks fine\n",
            r"1 whose column comment is no caption beside question, answer \(save those as a column conversations; or,",
        ),
        ("a.csv", b"image,text,Label\na.png,x,0\n", "1 whose column text is no caption beside Label"),
        ("a.csv", b"image,caption,label\na.png,x,a class\n", "1 whose column caption is no caption beside label"),
        ("a.csv", b"image,caption,prompt\na.png,x,y\n", "1 whose column caption is no caption beside prompt"),
        ("a.csv", b'image,caption\n"[1, 2]",x\n', r"1 that cannot be used \(wrong type\)"),
        ("a.csv", b"image_url,caption\nhttp://[a/a.png,x\n", "1 whose image is not in"),
        (
            "a.csv",
            b"image,caption\n\"['a.png', 'b.png']\",x\n",
            "1 that have no image, or several",
        ),
        ("a.parquet", b"PAR1 or so", "a.parquet is not a readable parquet file: .*fetch it again"),
        ("a.txt", b"x", "a.txt is not JSON, JSONL"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, name, content, message):
    images(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path / name)


def test_a_folder_of_images_with_texts(tmp_path):
    images(tmp_path, ["b/two.jpg", "a/one.png", "three.png", "lonely.png"])
    for name in ("b/two", "a/one", "no_image"):
        (tmp_path / f"{name}.txt").write_text(f"The {name}.\n")
    (tmp_path / "three.txt").write_bytes(b" \n")
    pairs = open_pairs(tmp_path)
    assert captions(pairs) == {"a/one": "The a/one.", "b/two": "The b/two."} and widths(pairs) == [2, 1]
    assert pairs.left_out == {
        "without a caption": 1,
        "that cannot be used (no text)": 1,
        "that cannot be used (missing image)": 1,
    }


def llava_records() -> list[dict]:
    """One image, two, none, one in a list, and one without an answer."""
    return [
        {"id": "a", "image": "0.png", "conversations": conversation(0)},
        {"id": "b", "image": ["0.png", "1.png"], "conversations": conversation(1, "<image><image>?")},
        {"id": "c", "conversations": conversation(2, "Hello?")},
        {"id": "d", "images": ["1.png"], "messages": [*conversation(3), *conversation("3 again", "And?")]},
        {"id": "e", "image": "1.png", "conversations": conversation(4)[:1]},
    ]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "lines.json"])
def test_llavas_records_of_one_image(tmp_path, name):
    images(tmp_path / "images", ["0.png", "1.png"])
    records = llava_records()
    text = json.dumps(records) if name == "d.json" else "\n".join(json.dumps(record) for record in records)
    (tmp_path / name).write_text(text)
    pairs = open_pairs(tmp_path / name, images=tmp_path / "images")
    assert [pair.caption for pair in pairs] == ["Number 0.", "Number 3.\nNumber 3 again."] and widths(pairs) == [1, 2]
    assert pairs.left_out == {"that have no image, or several": 2, "without a caption": 1}


def test_an_image_that_cannot_be_opened_is_named_and_ends_nothing(tmp_path):
    names = ["good.png", "text.png", "empty.png", "cut.png", "gone.png"]
    images(tmp_path, names)
    for number, data in ((1, b"this is no picture"), (2, b""), (3, picture(3)[:40])):
        (tmp_path / names[number]).write_bytes(data)
    (tmp_path / "d.csv").write_text("file_name,caption\n" + "".join(f"{name},It is {name}.\n" for name in names))
    pairs = open_pairs(tmp_path / "d.csv")
    assert len(pairs) == 5
    (tmp_path / "gone.png").unlink()
    faults = {}
    for pair in pairs:
        try:
            pair.image()
        except ValueError as fault:
            faults[pair.key] = str(fault)
    assert list(faults) == names[1:] and all(str(tmp_path / name) in faults[name] for name in faults)
    assert "No such file" in faults["gone.png"] and "the image cannot be opened: cannot identify" in faults["text.png"]


def test_images_are_opened_upright_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "d.csv").write_text("file_name,caption\nturned.jpg,Turned.\nclear.png,Clear.\n")
    turned, clear = (pair.image() for pair in open_pairs(tmp_path / "d.csv"))
    assert turned.size == (4, 8) and clear.getpixel((0, 0)) == (255, 255, 255)


def test_a_pair_can_be_sent_to_another_process(tmp_path):
    images(tmp_path, ["a.png"])
    rows = [{"image": {"bytes": picture(4), "path": None}, "caption": "It."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text("file_name,caption\na.png,It.\n")
    for path in (tmp_path / "d.parquet", tmp_path / "d.csv"):
        pair = open_pairs(path)[0]
        sent = pickle.loads(pickle.dumps(pair))
        assert sent.caption == pair.caption and sent.image().tobytes() == pair.image().tobytes()


def test_a_sample_is_without_replacement_and_lies_in_a_larger_one(tmp_path):
    pairs = table(tmp_path, 40)
    for seed in range(3):
        samples = [[pair.key for pair in sample(pairs, count, seed)] for count in (1, 7, 39, 40)]
        assert [len(set(keys)) for keys in samples] == [1, 7, 39, 40]
        assert set(samples[0]) < set(samples[1]) < set(samples[2]) < set(samples[3])
        assert all(keys == sorted(keys, key=pairs.keys.index) for keys in samples)  # the data's order
    taken = [pair.key for seed in range(400) for pair in sample(pairs, 10, seed)]
    # Each of 40 in 400 x 10 / 40 = 100 samples, deviation sqrt(400 x 1/4 x 3/4) = 8.7; five of these.
    assert all(abs(taken.count(key) - 100) < 44 for key in pairs.keys)


@pytest.mark.parametrize(
    "count, message", [(41, "--num-samples 41: only 40 pairs have a caption; lower it"), (0, "least 1")]
)
def test_a_sample_that_is_too_large_says_how_many_there_are(tmp_path, count, message):
    with pytest.raises(ValueError, match=message):
        sample(table(tmp_path, 40), count, 0)
