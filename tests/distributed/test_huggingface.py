"""transformers' Trainer over DDP and FSDP2: two ranks and several micro-batches give the loss and the gradients of one process, written out."""

import pytest

from rsa_megatron import RSAConfig
from rsa_megatron.huggingface import trainer as mixin
from tests.support import processes, trainer_models, trainer_runs
from tests.support.trainer_models import Sample

# Of float32 sums in another order: 2e-7 to 4e-7 are seen.
CLOSE = 3e-6
WEIGHT = 2e-3  # at these models' first weights RSA's gradient is then about as large as the LM loss's
ON = RSAConfig(weight=WEIGHT)
TEXT_ONLY = Sample((), (31, 32, 33, 34, 35))


def steps_of_rank(cases: list) -> list[trainer_runs.Step]:
    return [*(_step_of_rank(*case) for case in cases), trainer_runs.take_sharded_step("qwen2_5_vl", 2, ON)]


def _step_of_rank(name, chosen, config, options, sabotage):
    with pytest.MonkeyPatch.context() as patch:
        if sabotage:
            patch.setattr(*_SABOTAGE[sabotage])
        return trainer_runs.take_step(name, chosen, config, **options)


_SABOTAGE = {
    "own pairs only": (mixin, "gather_pairs", lambda v_nD, t_nE: (v_nD, t_nE, v_nD.detach(), t_nE.detach(), 0)),
    "without the factor D": (mixin, "count_ranks", lambda: 1),
    "without the factor 1/M": (mixin.RSATrainerMixin, "_rsa_micro_batches", lambda trainer: 1),
}


def case(name, num_micro_batches, config=ON, chosen=None, sabotage=None):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=num_micro_batches)
    return name, chosen or trainer_models.samples(4 * num_micro_batches), config, options, sabotage


def ragged() -> list[Sample]:
    """Two samples a batch, for rank 0, rank 1 and so on: rank 1 has one without an image, then one pair where rank 0 has two."""
    one = trainer_models.samples(5)
    return [one[0], one[1], TEXT_ONLY, TEXT_ONLY, one[2], one[3], Sample((1, 2), (41, 42)), one[4]]


def test_two_ranks_are_one_process_with_both_ranks_samples():
    normalized = RSAConfig(weight=1.0, normalize="mean-distance", distance="cosine")
    whole_step = RSAConfig(weight=WEIGHT, scope="global-batch")
    cases = [
        case("qwen2_5_vl", 1),
        case("qwen2_5_vl", 4),
        case(
            "llava_onevision", 4
        ),  # whose loss is one of the whole step's tokens, and not divided by the micro-batches
        case("qwen2_5_vl", 2, normalized),
        case("llava_onevision", 2, whole_step),
        case("qwen2_5_vl", 2, whole_step),
        case("llava_onevision", 2, chosen=ragged()),
    ]
    controls = [
        case("qwen2_5_vl", 1, sabotage="own pairs only"),
        case("qwen2_5_vl", 1, sabotage="without the factor D"),
        case("llava_onevision", 4, sabotage="without the factor 1/M"),
        case("qwen2_5_vl", 1, RSAConfig(weight=0)),
    ]
    ranks = processes.run(steps_of_rank, 2, cases + controls)
    expected = {}
    for i, (name, _, config, *_) in enumerate(cases):
        expected[i] = trainer_runs.write_out_step(name, [steps[i].micro_batches for steps in ranks], config)
        for steps in ranks:
            assert trainer_runs.differ_by(steps[i].gradients, expected[i].gradients) < CLOSE, (name, config)
            for figure in ("loss", "lm_loss", "rsa_loss", "rsa_pairs"):
                assert steps[i].log[figure] == pytest.approx(expected[i].log[figure], rel=1e-5), (name, figure)
    left_out = {figure: n for figure, n in ranks[0][6].log.items() if "left_out" in figure}
    assert left_out == {"rsa_left_out_no_image": 2, "rsa_left_out_several_images": 1}
    for sharded in (steps[-1] for steps in ranks):  # FSDP2: the same samples as the first case's
        assert trainer_runs.differ_by(sharded.gradients, expected[0].gradients) < CLOSE
    for step, i in zip(ranks[0][len(cases) : -1], (0, 0, 2, 0), strict=True):
        assert trainer_runs.differ_by(step.gradients, expected[i].gradients) > 0.1
