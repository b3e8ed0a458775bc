"""The benchmark of ranks at a size at which its times mean nothing but its counts do; and the model's arithmetic."""

import json
import subprocess
import sys

import pytest

from rsa_megatron.alignment import loss
from tests.support.environment import BENCHMARKS

sys.path.append(str(BENCHMARKS))

import rsa_on_paper  # noqa: E402
import rsa_ranks  # noqa: E402

pytestmark = pytest.mark.usefixtures("preloaded_benchmarks")


def test_every_rank_gathers_once_and_sends_nothing_in_backward(tmp_path):
    command = [
        sys.executable,
        BENCHMARKS / "rsa_ranks.py",
        "--sizes",
        "32",
        "--runs",
        "1",
        "--append",
        tmp_path / "f.jsonl",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    points = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(point["N"], point["ranks"]) for point in points] == [(32, 1), (32, 2), (32, 4)]
    for point in points:
        formula = (point["ranks"] - 1) * point["N"] // point["ranks"] * (1152 + 3584 + 1) * 4
        assert point["model_bytes"] == formula
        for counted in point["sent_received_bytes"]:
            # gloo's messages have heads of 48 bytes, a few of them for each rank; a row has 19 KB.
            assert 0 <= counted - formula < 2000
        assert point["collectives_forward"] == ["c10d._allgather_base_"]
        assert point["collectives_backward"] == [] and point["backward_bytes"] == 0
        assert point["error"] < 1e-5  # float32, products summed in another order
        assert point["work_s"] > 0 and point["gemm_part"] > 0 and point["model_work_s"] > 0
    assert result.stdout.count("| 32 | 4 |") == 2


def test_a_size_that_ranks_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rsa_ranks.py", "--sizes", "30"])
    with pytest.raises(SystemExit):
        rsa_ranks.parse()
    assert "--sizes 30: give multiples of 4" in capsys.readouterr().err


def products_by_hand(num_own, num_pairs, width):
    """Row by row: a distance with each row that is not the mirror of one before, and a product for the gradient."""
    flops = 0
    for i in range(num_own):
        flops += sum(2 * width for j in range(num_pairs) if not (j < i < num_own)) + 2 * width * num_pairs
    return flops


@pytest.mark.parametrize("num_own, num_pairs", [(400, 400), (100, 400), (1, 400)])
def test_flops_are_those_counted_row_by_row(num_own, num_pairs):
    expected = products_by_hand(num_own, num_pairs, width=3)
    # The diagonal is computed whole, by the formula half: n of about 4 n N products of rows.
    assert rsa_on_paper.flops(num_own, num_pairs, 3) == pytest.approx(expected, rel=1 / (3 * num_pairs))
    # And without the mirrored half one would be off by a quarter of n / N.
    assert num_own < 100 or 4 * num_own * num_pairs * 3 > 1.05 * expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 224])
def test_flops_of_all_ranks_are_3_to_4_times_n_squared_w(num_ranks):
    num_pairs, width = 224 * 8, 10
    total = num_ranks * rsa_on_paper.flops(num_pairs // num_ranks, num_pairs, width)
    assert total == pytest.approx((4 - 1 / num_ranks) * num_pairs**2 * width)


def test_the_table_of_gpus_is_arithmetic_of_its_rates(tmp_path, monkeypatch, capsys):
    flags = [
        "--ranks",
        "64",
        "--micro-batches",
        "2",
        "--gpu-tflops",
        "40",
        "--gbytes-per-s",
        "50",
        "--hop-microseconds",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["rsa_on_paper.py", *flags, "--append", str(tmp_path / "f.jsonl")])
    rsa_on_paper.main()
    figures = json.loads((tmp_path / "f.jsonl").read_text())
    received = 63 * 2 * (1152 + 3584 + 1) * 4
    assert (figures["N"], figures["received_bytes"]) == (128, received)
    assert figures["parts_s"]["gather"] == pytest.approx(received / 50e9 + 6 * 3e-6)  # a tree of 64
    in_a_ring = (figures["part_of_step_in_a_ring"] - figures["part_of_step"]) * figures["step_s"]
    assert in_a_ring == pytest.approx((63 - 6) * 3e-6)
    # Two own rows: reading everyone's takes longer than the arithmetic.
    reading = 2 * 128 * 4736 * 4 / 2680e9
    assert figures["parts_s"]["products"] == pytest.approx(reading) and reading > figures["flops"] / 40e12
    assert "| 64 | 2 | 128 |" in capsys.readouterr().out


def test_the_most_ranks_are_just_within_a_percent_of_a_step():
    rates = rsa_on_paper.Rates(flops=40e12, memory=2.7e12, entry=6e-11, network=50e9, hop=5e-6, block=1.75e-4)
    for part in ("part_of_step", "part_of_step_in_a_ring"):
        most = rsa_on_paper.most_ranks(1, rates, part)
        assert rsa_on_paper.on_paper(most, 1, rates)[part] <= 0.01 < rsa_on_paper.on_paper(most + 1, 1, rates)[part]


@pytest.mark.parametrize(
    "num_own, num_pairs", [(1, 224), (8, 1792), (300, 2400), (1024, 4096), (1500, 9000), (5000, 5000)]
)
def test_blocks_are_as_many_as_the_loss_makes(num_own, num_pairs):
    first = (num_pairs - num_own) // 2
    blocks = loss._block_pairs(slice(first, first + num_own), num_pairs, (rsa_on_paper.BLOCK_ROWS,) * 2)
    assert rsa_on_paper.num_blocks(num_own, num_pairs) == len(list(blocks))
