"""The files in results/ hold nothing of the machine that wrote them, and its figures are drawn again from its lines."""

import importlib.util
from pathlib import Path

import pytest
import revision_results

from rsa_megatron.cli import gap_report

RESULTS = Path(__file__).parents[2] / "results"
MACHINE_PATHS = (b"/tmp/", b"/work", b"/home", b"/root")


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an archive of the sources has no results")
def test_no_result_holds_a_path_of_a_machine():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(files) > 10
    found = {(path.name, text) for path in files for text in MACHINE_PATHS if text in path.read_bytes()}
    assert not found


class Source:
    def __init__(self, description):
        self.description = description


def test_a_source_is_named_relative_to_the_working_folder_or_by_its_base_name(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for description, name in (
        (f"{tmp_path}/work/features/clip, layer 3", "features/clip, layer 3"),
        (f"{tmp_path}/other/clip, layer embedding", "clip, layer embedding"),
        ("features/a, b.safetensors, tensor x/y", "features/a, b.safetensors, tensor x/y"),
        ("../images.npy", "images.npy"),
    ):
        assert gap_report.name_source(Source(description)) == name


def test_an_encoders_settings_hold_names_and_no_paths():
    figures = {"R@1": 0.5, "settings": {"data": "/tmp/demo/data/captions", "lr": 0.1, "num_samples": None}}
    expected = {"R@1": 0.5, "settings": {"data": "captions", "lr": 0.1, "num_samples": None}}
    assert revision_results.strip_folders(figures) == expected


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an archive of the sources has no results")
def test_every_figure_is_drawn_again_with_the_same_bytes(tmp_path):
    specification = importlib.util.spec_from_file_location("redraw", RESULTS / "redraw.py")
    redraw = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(redraw)
    for name in ("first", "second"):
        redraw.main(["--out", str(tmp_path / name)])
    figures = {path.name for path in RESULTS.iterdir() if path.suffix in (".png", ".svg")}
    assert {path.name for path in (tmp_path / "first").iterdir()} == figures
    for name in figures:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
