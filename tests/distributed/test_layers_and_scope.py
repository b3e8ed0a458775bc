"""--rsa-layers and --rsa-scope in training: every layout equals one process, and one process equals what they are to mean.

As test_parity.py has it, with its batches and its tolerance.
"""

import pytest
import torch

from tests.support import layouts, processes, tiny
from tests.support.layouts import LAYOUTS, SINGLE, largest_difference, layout_of
from tests.support.parity import CAPTION, LAYERS, PAIRS, RECOMPUTE, TOLERANCE, WHOLE, flags, of_every_kind


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_pairs_of_layers_in_every_layout(parity, layout):
    differences = parity.differences((layout, 2, True, False), options=(*LAYERS, *CAPTION), batches_of=of_every_kind)
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", ["TP=2 SP", "DP=2 PP=2", "PP=2 VPP=2"])
def test_pairs_of_layers_of_captions_in_their_rows(parity, name):
    differences = parity.differences((layout_of(name), 2, True, False), options=LAYERS)
    assert max(differences.values()) < TOLERANCE, differences


# Each layout with one of the losses, and one of each kind with both.
SCOPES = [(layout, number % 2 == 0) for number, layout in enumerate(LAYOUTS)]
SCOPES += [(layout_of("DP=2"), False), (layout_of("TP=2 PP=2"), True)]


@pytest.mark.parametrize(
    "layout, per_token", SCOPES, ids=lambda value: getattr(value, "name", "per-token" if value else "")
)
def test_a_whole_batch_in_every_layout(parity, layout, per_token):
    """Numbers of pairs that differ from micro-batch to micro-batch, the first of some rank's none at all."""
    differences = parity.differences((layout, 4, per_token, False), options=WHOLE)
    assert differences["rsa pairs"] == 0
    assert max(differences.values()) < TOLERANCE, differences


def image_after_its_caption(num_micro_batches):
    """The caption's last token stands just before the image, where LLaVAModel lets it go."""
    made = [[tiny.batch(100 * i + m) for m in range(num_micro_batches)] for i in range(2)]
    for batch in sum(made, []):
        end_B = batch.rsa.caption_mask.cumsum(1).argmax(1) + 1
        batch.tokens[:, 0] = 11
        batch.tokens[torch.arange(4), end_B] = tiny.IMAGE_TOKEN
    return made


@pytest.mark.check
def test_the_token_before_an_image_is_in_no_layer(parity):
    differences = parity.differences(
        (layout_of("PP=2"), 2, True, False), options=LAYERS, batches_of=image_after_its_caption
    )
    assert max(differences.values()) < TOLERANCE, differences


def sums_left_on_their_stage():
    from rsa_megatron.hooks import transport

    right = transport.caption_sums
    transport.caption_sums = lambda *args: right(*args).detach()


def mask_of_no_caption():
    from rsa_megatron.hooks import token_positions

    right = token_positions.spliced
    token_positions.spliced = lambda mask_BS, *args: right(mask_BS.roll(1, dims=1), *args)


@pytest.mark.parametrize("sabotage", [sums_left_on_their_stage, mask_of_no_caption])
def test_sums_that_did_not_come_back_would_be_seen(parity, sabotage):
    assert parity.differences((layout_of("PP=2"), 2, True, False), sabotage, LAYERS)["gradients"] > 1000 * TOLERANCE


def test_layers_before_the_last_are_not_recomputed(parity):
    with pytest.raises(processes.Failed, match="with layers before the last set --recompute-granularity selective"):
        parity.run((SINGLE, 1, False, False), options=(*LAYERS, *RECOMPUTE))


@pytest.mark.parametrize(
    "layers, message",
    [
        ("-1:5", "--rsa-layers, text layer 5: it has 4 layers"),
        ("3:-1", "--rsa-layers, vision layer 3: it has 2 layers"),
    ],
)
def test_layers_that_there_are_not_are_named(parity, layers, message):
    with pytest.raises(processes.Failed, match=message):
        parity.run((SINGLE, 1, False, False), options=("--rsa-layers", layers))


def test_one_process_is_the_sum_over_pairs_of_layers(parity):
    """Each pair's states read off the model by hooks of the test's own, pooled by hand, eq. 5 by autograd."""
    argv = [*flags(parity.demo, 1, False, False, 1, None), *LAYERS]
    batch = tiny.batch(0, (1, 1, 0, 1))
    actual = layouts.run(SINGLE, [[batch]], argv, load=parity.initial)
    (expected,) = processes.run(_pairs_by_plain_autograd, 1, argv, str(parity.initial), batch)
    for name, value in expected["figures"].items():
        # 30 float32 operations of 6e-8 between the two orders of summation.
        assert actual.losses[0][name] == pytest.approx(value, rel=1e-5), name
    assert largest_difference(actual.gradients, layouts._assemble([expected["gradients"]]))[0] < TOLERANCE


def _pairs_by_plain_autograd(argv, initial, batch):
    from megatron.core.utils import unwrap_model

    from rsa_megatron.alignment.loss import rsa_loss_reference

    trainer = layouts.Trainer([*argv, "--rsa-weight", "0", "--pretrained-checkpoint", initial])
    (model,) = unwrap_model(trainer.model)
    vision, text = {}, {}

    def entering(states):
        return lambda module, args, kwargs: states.update({0: kwargs.get("hidden_states", args[0] if args else None)})

    tower, decoder = model.vision_model.decoder, model.language_model.decoder
    tower.register_forward_pre_hook(entering(vision), with_kwargs=True)
    decoder.register_forward_pre_hook(entering(text), with_kwargs=True)
    for backbone, states in ((tower, vision), (decoder, text)):
        for number, layer in enumerate(backbone.layers, start=1):
            layer.register_forward_hook(lambda m, a, out, states=states, number=number: states.update({number: out[0]}))
    decoder.register_forward_hook(lambda m, a, out: text.update({4: out}))
    token_loss, _ = model(
        batch.images,
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        image_layouts=batch.image_layouts,
        sound_clips=torch.zeros(0),
    )
    shift = tiny.layout(1).num_tokens(side=2, max_tiles=9) - 1
    chosen = batch.rsa.eligible.nonzero().flatten().tolist()
    rows = [shift + batch.rsa.caption_mask[b].nonzero().flatten() for b in chosen]
    learnt = [shift + batch.loss_mask[b].nonzero().flatten() for b in range(4)]
    lm_loss = torch.cat([token_loss[b, positions] for b, positions in enumerate(learnt)]).mean()
    figures, rsa_loss = {"lm loss": lm_loss.item()}, 0
    for v_layer, t_layer, weight in PAIRS:
        v_ND = torch.stack(
            [vision[v_layer % 3][:, b].mean(0) for b in chosen]
        )  # -1 is 2 and -2 is 1 of the layers 0 to 2
        t_NE = torch.stack([text[t_layer % 5][r, b].mean(0) for r, b in zip(rows, chosen)])
        loss = rsa_loss_reference(v_ND, t_NE)
        figures[f"rsa loss {v_layer}:{t_layer}"] = loss.item()
        rsa_loss = rsa_loss + weight * loss
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(lm_loss + 0.3 * rsa_loss, list(parameters.values()), allow_unused=True)
    by_parameter = {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients)}
    return {
        "figures": figures | {"rsa loss": rsa_loss.item()},
        "gradients": trainer.shards(by_parameter.__getitem__),
    }


def test_a_step_in_parts_is_the_step_in_one_on_average_over_orders(parity):
    """Two micro-batches of four, in both orders, against one of eight: the kernel's value in each, the gradient in the mean."""
    parts = [tiny.batch(0), tiny.batch(1)]

    def run(micro_batches, size, scope):
        argv = [
            *flags(parity.demo, 1, False, False, 1, None),
            "--micro-batch-size",
            str(size),
            "--global-batch-size",
            "8",
        ]
        return layouts.run(SINGLE, [micro_batches], [*argv, *scope], load=parity.initial)

    whole = run([tiny.joined(*parts)], 8, ())
    orders = [run(parts, 4, WHOLE), run(parts[::-1], 4, WHOLE)]
    for name in ("rsa loss", "rsa pairs", "rsa dist vision", "rsa dist text"):
        assert [one.losses[0][name] for one in orders] == pytest.approx([whole.losses[0][name]] * 2, rel=1e-5)
    mean = {name: (orders[0].gradients[name] + orders[1].gradients[name]) / 2 for name in whole.gradients}
    assert largest_difference(mean, whole.gradients)[0] < TOLERANCE
    # One order alone is off; and so are kernels of micro-batches, in every order.
    assert largest_difference(orders[0].gradients, whole.gradients)[0] > 1000 * TOLERANCE
    assert largest_difference(run(parts, 4, ()).gradients, whole.gradients)[0] > 1000 * TOLERANCE
