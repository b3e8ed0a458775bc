"""The arithmetic gives what PyTorch counts on a real training step, to the last operation.

By plain products the decoder's attention is computed in full, its upper half masked afterwards; and padding is computed: both are
told apart here by what is passed for the lengths.
"""

import dataclasses

import pytest
import torch

from rsa_megatron.models.architectures import get_architecture
from rsa_megatron.planning.flops import training_flops
from tests.support import layouts, processes, tiny

ALL = ("vision", "projector", "embeddings", "language")
STAGE_1 = ("vision", "projector")
#: Five rows, padded to the longest: images of one tile, of a base tile and a grid of two, and text alone.
TILES, TOKENS_OF_A_TILE = (1, 0, 3, 1, 0), 4
_MODULES = {"vision": "vision_model", "projector": "vision_projection"}


def counted(argv, batch):
    """PyTorch's count of one of Megatron's training steps, by the part that computes it, and the length of the padded rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    trainer, lengths = layouts.Trainer(argv), []
    forward_step = trainer.forward_step

    def with_length(*args):
        output, loss_func = forward_step(*args)
        lengths.append(output.shape[1])
        return output, loss_func

    trainer.forward_step = with_length
    # By plain products: the counter does not know the CPU's flash attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.step([batch], 0)
    by_module = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    flops = {part: by_module[f"DistributedDataParallel.module.{module}"] for part, module in _MODULES.items()}
    # What is left is the decoder's. (In the backward pass the counter takes the tower for a part of it, as it comes later.)
    return flops | {"language": counter.get_total_flops() - sum(flops.values())}, lengths[0]


def step_flops(demo, trainable, *flags):
    argv = [
        "--tokenizer-model",
        str(demo / "tokenizer"),
        "--data-path",
        str(demo / "data" / "captions"),
        "--rsa-weight",
        "0",
        "--micro-batch-size",
        "5",
        "--global-batch-size",
        "5",
        "--trainable",
        *trainable,
        *flags,
    ]
    batch = tiny.batch(1, eligible=(0,) * 5, num_targets=(9,) * 5, tiles=TILES)
    ((flops, length),) = processes.run(counted, 1, argv, batch)
    return flops, length


def arithmetic(trainable, length, architecture=tiny.TINY):
    """With the attention in full: twice the half that counts."""
    return training_flops(
        architecture,
        trainable,
        num_tiles=sum(TILES),
        num_positions=len(TILES) * length,
        squared_lengths=2 * len(TILES) * length**2,
        num_image_tokens=sum(TILES) * TOKENS_OF_A_TILE,
    )


@pytest.mark.parametrize("trainable", [ALL, STAGE_1, ("vision",), ("embeddings",), ("language",)])
def test_it_is_pytorchs_count(demo, trainable):
    flops, length = step_flops(demo, trainable)
    assert flops == arithmetic(trainable, length)


def test_megatron_takes_a_gradient_that_nothing_needs(demo):
    """Behind a frozen tower its linear layer that learns takes the gradient of its input all the same: no model FLOPs."""
    trainable = ("projector", "embeddings", "language")
    flops, length = step_flops(demo, trainable)
    needless = 2 * sum(TILES) * TOKENS_OF_A_TILE * tiny.TINY.vision.hidden_size * tiny.TINY.decoder.hidden_size
    expected = arithmetic(trainable, length)
    assert flops == expected | {"projector": expected["projector"] + needless}


def test_an_output_layer_of_its_own_learns_with_the_decoder(demo):
    untied = dataclasses.replace(tiny.TINY, decoder=dataclasses.replace(tiny.TINY.decoder, tie_word_embeddings=False))
    flops, length = step_flops(demo, ("embeddings",), "--untie-embeddings-and-output-weights")
    assert flops == arithmetic(("embeddings",), length, untied)
    assert flops["language"] < arithmetic(("embeddings",), length)["language"]  # tied, its gradient is taken


def test_amounts_may_be_tensors_and_add_up():
    amounts = dict(num_tiles=3, num_positions=70, squared_lengths=1900, num_image_tokens=12)
    once = training_flops(tiny.TINY, ALL, **amounts)
    twice = training_flops(tiny.TINY, ALL, **{name: torch.tensor(2.0 * amount) for name, amount in amounts.items()})
    assert {part: flops.item() for part, flops in twice.items()} == {part: 2 * flops for part, flops in once.items()}


def test_six_times_the_parameters_a_token():
    """The usual estimate: where all learns, a short row takes about 6 operations a parameter and position."""
    architecture = get_architecture("llava-ov-7b")
    amounts = dict(num_tiles=0, num_positions=1, squared_lengths=1, num_image_tokens=0)
    flops = training_flops(architecture, ALL, **amounts)["language"]
    parameters = sum(architecture.parameter_counts()["language"].values())
    assert flops == pytest.approx(
        6 * parameters, rel=1e-3
    )  # norms and biases, which are no products, are parameters too
