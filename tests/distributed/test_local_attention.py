"""The local layers' attention gives what Megatron's own gives, and makes no matrix of scores; of a packed row sequence by sequence."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from tests.support import layouts, processes

POSITIONS, SAMPLES = 200, 3
LENGTHS = (70, 1, 40, 49)  # of a packed row's sequences, and 40 positions of padding


def compared(argv):
    """Of the decoder's and the tower's attention: differences from Megatron's own, and the largest tensor that each keeps."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from rsa_megatron.models.local_attention import LocalAttention

    chunk = layouts.Trainer(argv).model[0].module
    found = {}
    for name, decoder in (("decoder", chunk.language_model.decoder), ("tower", chunk.vision_model.decoder)):
        attention = decoder.layers[0].self_attention.core_attention
        assert type(attention) is LocalAttention
        shapes = [attention.num_attention_heads_per_partition] + 2 * [attention.num_query_groups_per_partition]
        rows = [
            torch.randn(POSITIONS, SAMPLES, heads, attention.hidden_size_per_attention_head, requires_grad=True)
            for heads in shapes
        ]
        mask = torch.rand(SAMPLES, 1, POSITIONS, POSITIONS) < 0.3
        mask.diagonal(dim1=2, dim2=3).fill_(False)
        found[name] = {
            "ours": with_gradients(attention.forward, rows),
            "Megatron's": with_gradients(lambda *x: DotProductAttention.forward(attention, *x), rows),
            "masked": attention(*rows, mask).detach(),
            "Megatron's masked": DotProductAttention.forward(attention, *rows, mask).detach(),
            "packed": packed_and_alone(attention, [row[:, 0].detach().requires_grad_() for row in rows]),
        }
    return found


def packed_and_alone(attention, rows):
    """What a packed row gives, what Megatron's own gives for its sequences alone; with dropout; and what is refused."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from rsa_megatron.models.packed_rows import make_packed_seq_params

    packed = make_packed_seq_params(LENGTHS, POSITIONS)
    scripts_own = PackedSeqParams("thd", packed.cu_seqlens_q, packed.cu_seqlens_kv)

    def packed_row(*rows):
        return attention(*rows, None, packed_seq_params=packed)

    def alone(*rows):
        *sequences, padding = zip(*(row[:, None].split([*LENGTHS, POSITIONS - sum(LENGTHS)]) for row in rows))
        seen = [DotProductAttention.forward(attention, *sequence, None)[:, 0] for sequence in sequences]
        return torch.cat([*seen, seen[0].new_zeros(len(padding[0]), seen[0].shape[1])])

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()

    def with_dropout(of):
        tracker.set_states(dict(states))
        attention.attention_dropout.p = 0.5
        try:
            return of(*rows).detach()
        finally:
            attention.attention_dropout.p = 0.0

    refused = {}
    for name, options in (("mask", {"attention_mask": torch.zeros(1)}), ("bias", {"attention_bias": torch.zeros(1)})):
        try:
            attention(*rows, **{"attention_mask": None, "packed_seq_params": packed} | options)
        except ValueError as error:
            refused[name] = str(error)
    return {
        "row": with_gradients(lambda *rows: packed_row(*rows[:3]), rows)[0],
        "alone": with_gradients(lambda *rows: alone(*rows[:3]), rows)[0],
        "row of a script": attention(*rows, None, packed_seq_params=scripts_own).detach()[: sum(LENGTHS)],
        "row with dropout": with_dropout(packed_row),
        "alone with dropout": with_dropout(alone),
        "one sequence": attention(*(row[:, None] for row in rows), None)[:, 0].detach(),
        "refused": refused,
    }


def with_gradients(attention, rows):
    """Output and gradients, and how many numbers the largest tensor has that is kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        output = attention(*rows, None)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), rows)], max(kept)


@pytest.fixture(scope="module")
def found(demo):
    argv = ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions")]
    ((result),) = processes.run(compared, 1, argv)
    return result


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_output_and_gradients_are_megatrons(found, part):
    (ours, _), (theirs, _) = found[part]["ours"], found[part]["Megatron's"]
    for actual, expected in zip(ours, theirs):
        # Sums of 200 terms of size 1 in another order, roundings of 6e-8.
        assert (actual - expected).abs().max() < 2e-6 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_it_keeps_no_scores(found, part):
    assert found[part]["ours"][1] < POSITIONS**2 <= found[part]["Megatron's"][1]


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_a_mask_goes_to_megatrons_own(found, part):
    figures = found[part]
    assert torch.equal(figures["masked"], figures["Megatron's masked"])
    assert (figures["masked"] - figures["ours"][0][0]).abs().max() > 1e-2  # it was not left out


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_a_packed_row_is_its_sequences_alone(found, part):
    packed = found[part]["packed"]
    for actual, expected in zip(packed["row"], packed["alone"]):
        assert (actual - expected).abs().max() < 2e-6 * max(1.0, expected.abs().max())
    assert not packed["row"][0][sum(LENGTHS) :].any()  # padding attends to nothing
    assert torch.equal(packed["row of a script"], packed["row"][0][: sum(LENGTHS)])
    assert (packed["row"][0] - packed["one sequence"])[: sum(LENGTHS)].abs().max() > 1e-2


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_dropout_in_a_packed_row_is_megatrons(found, part):
    packed = found[part]["packed"]
    assert torch.equal(packed["row with dropout"], packed["alone with dropout"])
    assert (packed["row with dropout"] - packed["row"][0]).abs().max() > 1e-2


def test_a_packed_row_takes_no_mask_and_no_bias(found):
    refused = found["decoder"]["packed"]["refused"]
    assert set(refused) == {"mask", "bias"} and all("pass none" in message for message in refused.values())
