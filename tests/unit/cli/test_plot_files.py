"""What rsa-megatron plot writes: whole files, the same bytes each time, or one line that names the fault."""

import os
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from rsa_megatron.cli import plot
from rsa_megatron.plots import alignment
from rsa_megatron.plots.alignment_records import read_alignments
from tests.support.plot_lines import (
    GOOD,
    VERBS,
    all_runs,
    measured,
    random_line,
    records_for,
    texts,
    trained,
)


@pytest.mark.parametrize("verb", VERBS)
def test_png_and_svg_can_be_read_and_have_the_same_bytes_each_time(write_lines, tmp_path, verb):
    path = write_lines(records_for(verb))
    written = []
    for out in (tmp_path / "first" / "qwen2.5", tmp_path / "second" / "qwen2.5.png"):
        plot.main([verb, str(path), "--out", str(out)])
        assert sorted(os.listdir(out.parent)) == ["qwen2.5.png", "qwen2.5.svg"]  # and no temporary file
        written.append([(out.parent / f"qwen2.5.{kind}").read_bytes() for kind in ("png", "svg")])
    assert written[0] == written[1]
    image = Image.open(tmp_path / "first" / "qwen2.5.png")
    assert image.width > 700 and len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank, in greyscale either
    svg = xml.etree.ElementTree.fromstring(written[0][1])
    assert svg.tag.endswith("svg") and b"dc:date" not in written[0][1]


def test_an_older_figure_is_replaced_as_a_whole(write_lines, tmp_path):
    (tmp_path / "figure.svg").write_bytes(b"an older figure")
    os.link(tmp_path / "figure.svg", tmp_path / "link")  # as a reader that has it open
    plot.main(["steps", str(write_lines(all_runs())), "--out", str(tmp_path / "figure")])
    assert (tmp_path / "link").read_bytes() == b"an older figure" != (tmp_path / "figure.svg").read_bytes()


def test_lines_of_other_kinds_are_left_out_and_told(write_lines, capsys, tmp_path):
    old = write_lines([{"group": "with RSA"}, "", trained()], "old.jsonl")
    plot.main(["bars", str(old), str(write_lines([measured()])), "--out", str(tmp_path / "bars")])
    assert f"skipped: 2 lines of {old} that are not of `rsa-megatron measure`" in capsys.readouterr().out


def without(key: str) -> dict:
    return {name: value for name, value in measured().items() if name != key}


def pair_with(**changes) -> dict:
    record = measured()
    return record | {"best": record["best"] | changes}


FAULTS = {
    "empty": ("heatmap", [], "{path} is empty"),
    "broken JSON": ("bars", [GOOD, "{"], "{path}, line 2: broken JSON: "),
    "no object": ("bars", ["[1]"], "{path}, line 1: not a JSON object"),
    "other kind": (
        "stages",
        [GOOD],
        "{path} holds lines of `rsa-megatron measure`, which `rsa-megatron plot heatmap` and `bars` draw; "
        "this figure is of lines of `make reproduce`",
    ),
    "metrics.jsonl": (
        "steps",
        [{"iteration": 1, "lm loss": 3.0}],
        "{path} holds the figures of a training run by iteration, which `python examples/demo/plot_runs.py --group NAME "
        "{path} --out curves.png` draws; this figure is of lines of `make reproduce`",
    ),
    "lines of nothing": ("heatmap", [{"a": 1}], "{path} holds lines that no figure is of; this figure is of lines of"),
    "missing key": (
        "heatmap",
        [GOOD, without("mean")],
        "{path}, line 2: 'mean' is missing; it must be numbers [row][column], 5 x 7",
    ),
    "no seeds": ("bars", [GOOD | {"seeds": []}], "{path}, line 1: 'seeds' is a list of at least one seed, not '[]'"),
    "too few seeds": (
        "bars",
        [GOOD | {"seeds": [0]}],
        "{path}, line 1: 'scores' is numbers [seed][row][column], 1 x 5 x 7, not 3 x 5 x 7",
    ),
    "ragged": (
        "bars",
        [GOOD | {"mean": [[1.0], [1.0, 2.0]]}],
        "{path}, line 1: 'mean' is numbers [row][column], 5 x 7, not lists",
    ),
    "texts for numbers": ("bars", [GOOD | {"mean": [["0.1"] * 7] * 5}], "{path}, line 1: 'mean' is numbers"),
    "not a number": (
        "bars",
        [GOOD | {"mean": [[float("nan")] * 7] * 5}],
        "{path}, line 1: 'mean' has no finite number at [row][column] [0, 0]",
    ),
    "mean of other scores": (
        "bars",
        [GOOD | {"mean": (np.array(GOOD["mean"]) + 0.1).tolist()}],
        "{path}, line 1: 'mean' is not the mean of 'scores' over the seeds",
    ),
    "unknown layer": (
        "heatmap",
        [pair_with(row="99")],
        "{path}, line 1, 'best': 'row' is one of 'row_layers', not '99'",
    ),
    "best elsewhere": (
        "heatmap",
        [pair_with(mean=0.9)],
        "{path}, line 1, 'best': 'mean' is 0.9, but the line's 'mean' has ",
    ),
    "layers twice": (
        "heatmap",
        [GOOD | {"row_layers": ["0"] * 5}],
        "{path}, line 1: 'row_layers' is a list of different names",
    ),
    "side": ("heatmap", [GOOD | {"rows": "image"}], "{path}, line 1: 'rows' is vision or text, not 'image'"),
    "mixed metrics": (
        "bars",
        [GOOD, GOOD | {"metric": "cka"}],
        "{path}, line 1 and {path}, line 2: 'metric' is 'mutual-knn' and 'cka'; choose one with --metric",
    ),
    "mixed k": ("bars", [GOOD, GOOD | {"k": 10}], "{path}, line 2: 'k' is 5 and 10; draw them apart"),
    "mixed N": (
        "bars",
        [GOOD, GOOD | {"num_samples": 99}],
        "{path}, line 2: 'num_samples' is 60 and 99; draw them apart",
    ),
    "twice": ("bars", [GOOD, GOOD], "{path}, line 1 and {path}, line 2: both are LLaVA, COCO; draw them apart"),
    "only random": ("heatmap", [random_line()], "no line has more than one pair of layers"),
    "metric": ("bars --metric svcca", [GOOD], "--metric svcca: no line has it; there are mutual-knn"),
    "stage": ("stages", [trained(stage="3")], "{path}, line 1: 'stage' is one of the texts 1, 1.5, 2, not '3'"),
    "seed": ("stages", [trained(seed=1) | {"seed": "1"}], "{path}, line 1: 'seed' is a whole number, not '1'"),
    "diverged": (
        "steps",
        [trained(figures={"lm loss": [[1, 2.0], [2, float("nan")]]})],
        "{path}, line 1, 'figures': 'lm loss' has the point [2, nan]; a point is [iteration, finite value]",
    ),
    "iterations back": (
        "steps",
        [trained(figures={"lm loss": [[2, 2.0], [1, 2.0]]})],
        "'lm loss' has the point [1, 2.0]; a point is [iteration, finite value], and iterations rise",
    ),
    "before": (
        "steps",
        [trained(before={"mutual-knn": "0.1"})],
        "{path}, line 1, 'before': 'mutual-knn' is a number, not '0.1'",
    ),
    "run twice": (
        "steps",
        [trained(), trained()],
        "{path}, line 2: both are scenes, with RSA, stage 1, seed 1; draw them apart",
    ),
    "iterations apart": (
        "steps",
        [trained(before=None), trained(seed=2, before=None, figures={"mutual-knn": [[15, 0.1]]})],
        "{path}, line 1 and {path}, line 2: the seeds' 'mutual-knn' have no iteration in common",
    ),
    "figure": (
        "steps --figure loss",
        [trained()],
        "no run has the figure 'loss'; there are: mutual-knn, lm loss, rsa loss, accuracy on questions",
    ),
    "arm": ("steps --arms cosine", [trained()], "--arms 'cosine': no run is of that arm; arms: 'with RSA'"),
    "stage not run": (
        "ablation --stage 2",
        [trained()],
        "no run of stage 2 has the figure 'mutual-knn'; there are: none",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_it_and_nothing_is_written(write_lines, tmp_path, capsys, fault):
    command, lines, message = FAULTS[fault]
    path = write_lines(lines)
    (tmp_path / "figure.png").write_bytes(b"an older figure")
    verb, *flags = command.split()
    with pytest.raises(SystemExit) as stopped:
        plot.main([verb, str(path), "--out", str(tmp_path / "figure"), *flags])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert message.format(path=path) in printed
    assert (tmp_path / "figure.png").read_bytes() == b"an older figure" and not (tmp_path / "figure.svg").exists()


def test_a_missing_file_and_one_metric_of_several(write_lines, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main(["bars", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x")])
    assert "none.jsonl" in capsys.readouterr().err
    path = write_lines([GOOD, measured(metric="cka", chance=None)])
    (cka,) = read_alignments([path], "cka")
    printed = texts(alignment.draw_bars([cka]))
    assert "linear CKA of the best pair" in printed and "chance" not in printed and "k =" not in printed
