"""The local layers' attention gives what Megatron's own gives, and makes no matrix of scores."""

import pytest
import torch

from tests.support import layouts, processes

POSITIONS, SAMPLES = 200, 3


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
        }
    return found


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
