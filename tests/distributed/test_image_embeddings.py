"""Images that come as embeddings: in every layout what one process gives, and that what the words say."""

import pytest
import torch

from tests.support import embedding_data, layouts, processes, tiny
from tests.support.layouts import LAYOUTS, SINGLE, largest_difference

# As tests/distributed/test_parity.py: some hundred roundings of 6e-8 in another order.
TOLERANCE = 2e-5
WIDTH = 20


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """What the command line names; the batches are made up."""
    shards = embedding_data.write_shards(demo / "data" / "captions", tmp_path_factory.mktemp("data") / "shards", WIDTH)
    return ["--data-path", str(shards), "--tokenizer-model", str(demo / "tokenizer")]


def flags(data, data_parallel_size=1):
    return [
        *data,
        "--trainable",
        "projector",
        "--image-positions",
        "3",
        "--image-embedding-width",
        str(WIDTH),
        "--rsa-weight",
        "0.3",
        "--micro-batch-size",
        str(4 // data_parallel_size),
        "--global-batch-size",
        "8",
        "--calculate-per-token-loss",
        "--overlap-grad-reduce",
    ]


def batches(positions, texts=False):
    """Of two micro-batches, the second of texts without an image where `texts` says so."""
    second = dict(eligible=(0,) * 4, tiles=(0,) * 4) if texts else {}

    def made(seed, **options):
        return embedding_data.batch(seed, width=WIDTH, positions=positions, **options)

    return [[made(10 * i, eligible=(1, 0, 1, 1)), made(10 * i + 1, **second)] for i in range(3)]


@pytest.fixture(scope="module")
def initial(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings") / "initial"
    processes.run(_save_initial_weights, 1, flags(data), str(folder))
    return embedding_data.say_whose(folder, WIDTH)


def _save_initial_weights(argv, folder):
    from megatron.training.checkpointing import save_checkpoint

    trainer = layouts.Trainer([*argv, "--save", folder, "--save-interval", "1000", "--no-save-optim", "--no-save-rng"])
    save_checkpoint(0, trainer.model, None, None, 0)


@pytest.fixture(scope="module")
def reference(data, initial):
    found = {}

    def run(positions, texts=False):
        if (positions, texts) not in found:
            found[positions, texts] = layouts.run(SINGLE, batches(positions, texts), flags(data), load=initial)
        return found[positions, texts]

    return run


CASES = [(layout, 3, False) for layout in LAYOUTS] + [
    (layout, 1, True) for layout in LAYOUTS if layout.name in ("DP=2 PP=2", "TP=2 SP")
]


@pytest.mark.parametrize("layout, positions, texts", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_every_layout_equals_one_process(data, initial, reference, layout, positions, texts):
    actual = layouts.run(layout, batches(positions, texts), flags(data, layout.data_parallel_size), load=initial)
    expected = reference(positions, texts)
    for one, other in zip(actual.losses, expected.losses, strict=True):
        for name in ("lm loss", "rsa loss", "rsa dist vision", "rsa dist text"):
            assert one[name] == pytest.approx(other[name], rel=TOLERANCE), name
    assert largest_difference(actual.gradients, expected.gradients)[0] < TOLERANCE
    assert largest_difference(actual.parameters, expected.parameters)[0] < TOLERANCE


def test_only_the_projector_learns_and_rsa_reaches_it(data, initial, reference):
    with_rsa, without = reference(3), layouts.run(SINGLE, batches(3), [*flags(data), "--rsa-weight", "0"], load=initial)
    learns = {name for name, gradient in with_rsa.gradients.items() if gradient.any()}
    learns -= {"vision_model.ln_post.weight"}  # a buffer
    assert learns == {name for name in with_rsa.gradients if name.startswith("vision_projection.encoder")}
    # v is given and t frozen but for what the projector puts before the caption: through that RSA moves it.
    assert largest_difference(with_rsa.gradients, without.gradients)[0] > 1e-3


def test_an_embedding_stands_in_its_positions(data, initial, reference):
    """The LM loss of the first batch, by the decoder alone on rows put together by hand."""
    (expected,) = processes.run(_by_hand, 1, flags(data), str(initial), batches(3)[0])
    assert reference(3).losses[0]["lm loss"] == pytest.approx(expected, rel=1e-5)
    (other,) = processes.run(
        _by_hand, 1, flags(data), str(initial), batches(3)[0], 2
    )  # of two positions in the place of three
    assert abs(other / expected - 1) > 1e-4


def _by_hand(argv, initial, micro_batches, positions=3):
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.utils import unwrap_model

    trainer = layouts.Trainer([*argv, "--pretrained-checkpoint", initial])
    (model,) = unwrap_model(trainer.model)
    loss, num_tokens = 0, 0
    for batch in micro_batches:
        projected_B1H = MultimodalProjector.forward(model.vision_projection, batch.images[:, None])
        for row, tokens in enumerate(batch.tokens):
            text_SH = model.language_model.embedding(tokens[None], torch.arange(len(tokens))[None])[:, 0]
            states = torch.cat([projected_B1H[row].expand(positions, -1), text_SH[1:]])  # the image token is the first
            rsa_off = model.language_model(None, None, None, decoder_input=states[:, None])
            log_p = (
                rsa_off[0, positions - 1 :, : tiny.VOCAB_SIZE].float().log_softmax(-1)
            )  # its last position speaks for it
            token_loss = -log_p.gather(1, batch.labels[row][:, None])[:, 0]
            loss += (token_loss * batch.loss_mask[row]).sum().item()
            num_tokens += batch.loss_mask[row].sum().item()
    return loss / num_tokens
