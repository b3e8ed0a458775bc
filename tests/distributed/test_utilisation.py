"""mfu in the log is the model's FLOPs over the devices' time, in every layout, and Megatron's throughput is of the same FLOPs."""

import dataclasses
import math
import re
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsa_megatron.planning.flops import training_flops
from tests.support import embedding_data, layouts, processes, script, tiny

PEAK = 5e9
LAYOUTS = [layouts.SINGLE, *(layout for layout in layouts.LAYOUTS if layout.name not in ("TP=2 PP=2", "TP=2 SP"))]


def batches() -> list[list]:
    """Two iterations of two micro-batches, all of other sizes; tiny.part gives each data-parallel rank its half."""
    tiles = [(1, 1, 1, 1), (3, 0, 1, 1), (0, 0, 0, 0), (1, 4, 0, 2)]
    made = [tiny.batch(seed, eligible=(0,) * 4, tiles=numbers) for seed, numbers in enumerate(tiles)]
    return [made[:2], made[2:]]


def expected_flops(micro_batches: list) -> float:
    """By hand, sample for sample: a tile is 4 tokens, and a row as long as LlavaBatch says."""
    num_tiles = sum(int(batch.rsa.num_tiles.sum()) for batch in micro_batches)
    lengths = [int(length) for batch in micro_batches for length in batch.row_lengths]
    return sum(
        training_flops(
            tiny.TINY,
            ("vision", "projector"),
            num_tiles=num_tiles,
            num_positions=sum(lengths),
            squared_lengths=sum(length**2 for length in lengths),
            num_image_tokens=4 * num_tiles,
        ).values()
    )


def reports(argv, layout, all_batches, architecture=tiny.TINY) -> dict:
    """What one rank reports: (FLOPs, device time x peak) of each micro-batch, and what Megatron is told of the FLOPs."""
    import megatron.training.training
    import pretrain_llava_rsa

    from rsa_megatron.training import mfu as utilisation

    trainer = layouts.Trainer(argv)
    run = utilisation.Utilisation(trainer.args, architecture)
    run.apply()
    forward_step, found = run.wrap_forward_step(pretrain_llava_rsa.forward_step), []

    def watched(data_iterator, model):
        output, loss_func = forward_step(data_iterator, model)
        return output, lambda output_tensor: watch(loss_func(output_tensor))

    def watch(outputs):
        found.append(outputs[-1]["mfu"].tolist())
        return outputs

    trainer.forward_step = watched
    logged, told, begin = [], [], []
    for iteration, whole in enumerate([all_batches[0], *all_batches]):  # the first has none
        begin.append(time.perf_counter())
        parts = [tiny.part(batch, trainer.data_parallel_rank, layout.data_parallel_size) for batch in whole]
        logged.append(trainer.step(parts, iteration).get("mfu"))
        # Megatron asks each iteration, and again as it logs.
        size = trainer.args.global_batch_size
        told.append(
            [
                megatron.training.training.num_floating_point_operations(
                    trainer.args, size, seqlen_squared_sum_in_batch=None
                )
                for _ in "ab"
            ]
        )
    num_first = len(all_batches[0]) if found else 0
    assert found[:num_first] == [[0, 0]] * num_first and (logged[0] is None or math.isnan(logged[0]))
    return {
        "reports": found[num_first:],
        "logged": logged[1:],
        "seconds": [time.perf_counter() - begun for begun in begin[:2]],
        "told": told[1:],
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_flops_and_time_add_up_to_the_runs(demo, layout):
    argv = [
        "--data-path",
        str(demo / "data" / "captions"),
        "--tokenizer-model",
        str(demo / "tokenizer"),
        *layout.flags,
        "--micro-batch-size",
        str(4 // layout.data_parallel_size),
        "--global-batch-size",
        "8",
        "--rsa-weight",
        "0",
        "--trainable",
        "vision",
        "projector",
        "--seq-length",
        "64",
        "--peak-tflops",
        str(PEAK / 1e12),
    ]
    ranks = processes.run(reports, layout.world_size, argv, layout, batches())
    expected = [expected_flops(micro_batches) for micro_batches in batches()]
    # Ranks of the last stage report; of a tensor-parallel group all the same, of which Megatron takes one.
    reporting = [rank for rank in ranks if rank["reports"]]
    copies = len(reporting) // layout.data_parallel_size
    for iteration in (0, 1):
        flops = sum(pair[0] for rank in reporting for pair in rank["reports"][2 * iteration :][:2]) / copies
        assert flops == pytest.approx(expected[iteration], rel=1e-6)  # reported in float32
        time_x_peak = sum(pair[1] for rank in reporting for pair in rank["reports"][2 * iteration :][:2]) / copies
        for rank in reporting:
            # Tensor-parallel ranks have clocks of their own, whose readings differ by less than a step takes.
            assert rank["logged"][iteration] == pytest.approx(flops / time_x_peak, rel=0.2 if copies > 1 else 1e-5)
    for rank in reporting:
        # Each speaks for world_size / data_parallel_size devices. They begin within the first iteration, and the last report
        # comes before the last backward pass.
        seconds = sum(pair[1] for pair in rank["reports"]) / PEAK / (layout.world_size / layout.data_parallel_size)
        assert 0.3 * rank["seconds"][1] < seconds < rank["seconds"][0]
    # Of the whole batch, on every rank: Megatron adds it up and saves the sum as all ranks'.
    for rank in ranks:
        assert rank["told"] == ranks[0]["told"]
    assert ranks[0]["told"] == [[pytest.approx(flops, rel=1e-9)] * 2 for flops in expected]


def test_an_embedding_passes_the_tower_by_and_is_projected_once(demo, tmp_path):
    architecture = dataclasses.replace(tiny.TINY, image_embedding_width=20)
    made = [embedding_data.batch(seed, width=20, positions=5, eligible=(0,) * 4) for seed in (0, 1)]
    shards = embedding_data.write_shards(demo / "data" / "captions", tmp_path / "shards", 20)
    argv = [
        "--data-path",
        str(shards),
        "--tokenizer-model",
        str(demo / "tokenizer"),
        "--rsa-weight",
        "0",
        "--trainable",
        "projector",
        "--image-positions",
        "5",
        "--image-embedding-width",
        "20",
        "--micro-batch-size",
        "4",
        "--global-batch-size",
        "8",
        "--peak-tflops",
        str(PEAK / 1e12),
    ]
    (rank,) = processes.run(reports, 1, argv, layouts.SINGLE, [made], architecture)
    lengths = [int(length) for batch in made for length in batch.row_lengths]
    sizes = dict(num_positions=sum(lengths), squared_lengths=sum(length**2 for length in lengths))
    expected = training_flops(architecture, ("projector",), num_tiles=0, num_image_tokens=8, **sizes)
    assert sum(pair[0] for pair in rank["reports"]) == pytest.approx(sum(expected.values()), rel=1e-6)
    # 20 x 32 and 32 x 32: forward and the weights' gradient of both, and that of the second's input.
    assert expected["projector"] == 8 * 2 * (20 * 32 * 2 + 32 * 32 * 3) and expected["vision"] == 0


def counted_of_rows() -> dict[str, float]:
    """FLOPs of samples of 500, 300 and 7 positions with 2, 1 and 0 tiles: a row each, packed into one, and that as if it were one sample."""
    import argparse

    from rsa_megatron.training.mfu import Utilisation
    from rsa_megatron.training.train_step import StepBatch

    def count(row_lengths, sequence_lengths) -> float:
        batch = StepBatch(**dict.fromkeys(StepBatch.__dataclass_fields__))
        batch.tokens = torch.zeros(len(row_lengths), 9, dtype=torch.int64)
        batch.image_layouts = torch.tensor([tiny.layout(2).as_numbers(), tiny.layout(1).as_numbers()])
        batch.row_lengths = torch.tensor(row_lengths)
        batch.sequence_lengths = sequence_lengths and torch.tensor(sequence_lengths)
        args = argparse.Namespace(trainable=["vision", "projector", "language"], world_size=1, peak_tflops=None)
        return float(Utilisation(args, tiny.TINY)._count(batch))

    return {
        "a row each": count([500, 300, 7], None),
        "packed": count([807], [500, 300, 7]),
        "as one sample": count([807], None),
    }


def test_a_packed_row_has_the_flops_of_its_samples():
    (flops,) = processes.run(counted_of_rows, 1)
    assert flops["packed"] == flops["a row each"]
    # The attention of 4 layers of 32: forward and backward, half of q k^T and of its product with v.
    more = 3 * 4 * 2 * 32 * (807**2 - 500**2 - 300**2 - 7**2)
    assert flops["as one sample"] == pytest.approx(flops["packed"] + more, rel=1e-12) and more > 0.2 * flops["packed"]


def with_evaluations_in_the_time():
    from rsa_megatron.training import mfu as utilisation

    utilisation._NOT_TRAINING = ()


def seconds_counted(demo, folder, sabotage=None) -> tuple[float, float]:
    """Of a run that evaluates much longer than it trains: seconds behind its mfu, and those that Megatron's log has."""
    outputs = script.run(
        1,
        demo,
        "--rsa-weight",
        0,
        "--peak-tflops",
        1,
        "--eval-interval",
        2,
        "--eval-iters",
        20,
        "--mutual-knn-samples",
        0,
        "--tensorboard-dir",
        folder,
        "--log-throughput",
        "--log-timers-to-tensorboard",
        "--train-iters",
        8,
        sabotage=sabotage,
    )
    events = EventAccumulator(str(folder)).Reload()
    mfu, throughput, seconds = (
        {event.step: event.value for event in events.Scalars(name)} for name in ("mfu", "throughput", "iteration-time")
    )
    assert list(script.iterations(outputs)) == list(seconds) == [*range(1, 9)]
    assert list(mfu) == [*range(2, 9)]  # the first iteration's is not known
    # throughput x time is the FLOPs of an iteration in units of 1e12, and so is mfu x time, the peak being 1 TFLOP/s.
    return sum(throughput[i] * seconds[i] / mfu[i] for i in range(2, 9)), sum(seconds[i] for i in range(2, 9))


def test_evaluations_do_not_count(demo, tmp_path):
    counted, logged = seconds_counted(demo, tmp_path / "right")
    # Reports come in the middle of iterations: over a few, the two differ by a part of one.
    assert counted == pytest.approx(logged, rel=0.35)
    counted, logged = seconds_counted(demo, tmp_path / "wrong", with_evaluations_in_the_time)
    assert counted > 2 * logged


def test_a_cpu_has_no_peak_and_its_runs_no_mfu(demo):
    outputs = script.run(2, demo, "--train-iters", 2)
    assert "mfu: none; a CPU's peak is not known; --peak-tflops names it\n" in "".join(outputs)
    assert not any("mfu" in figures for figures in script.iterations(outputs).values())


def test_a_share_above_1_is_left_out_and_said_once(demo, tmp_path):
    flags = ("--train-iters", 4, "--peak-tflops", 1e-7, "--metrics-file", tmp_path / "metrics.jsonl")
    outputs = script.run(2, demo, *flags)
    said = re.findall(
        r"^WARNING: mfu [\d.e+]+ is above 1, and left out: name the device's peak by", "".join(outputs), re.M
    )
    assert len(said) == 1 and not any("mfu" in figures for figures in script.iterations(outputs).values())
    assert '"mfu"' not in (tmp_path / "metrics.jsonl").read_text()


DEVICES = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA A10G": None,
    "cpu": None,
}


def peaks(names):
    from rsa_megatron.training import mfu as utilisation

    return {name: utilisation.data_sheet_tflops(name) for name in names}


def test_a_device_is_known_by_its_name():
    assert processes.run(peaks, 1, list(DEVICES)) == [DEVICES]


def test_a_peak_of_nothing_is_refused(demo):
    with pytest.raises(processes.Failed) as failed:
        script.run(1, demo, "--peak-tflops", 0)
    assert "error: --peak-tflops 0: name a rate above 0, or leave the flag out" in failed.value.output
