"""One process against LM loss + weight * eq. 5, written out and left to autograd."""

import torch

from tests.support import layouts, processes, tiny
from tests.support.layouts import SINGLE
from tests.support.parity import (
    ELIGIBLE,
    TILES,
    flags,
)


def with_and_by_plain_autograd(parity, demo, options, tiles_of, detached, sabotage=None):
    argv = [*flags(demo, 1, False, False, 1, None), *options]
    batch = tiny.batch(0, ELIGIBLE[0], tiles=TILES)
    actual = layouts.run(SINGLE, [[batch]], argv, load=parity.initial, sabotage=sabotage)
    (expected,) = processes.run(_by_plain_autograd, 1, argv, str(parity.initial), batch, tiles_of, detached)
    return actual, expected


def _by_plain_autograd(argv, initial, batch, tiles_of, detached):
    from megatron.core.utils import unwrap_model

    from rsa_megatron.alignment.loss import rsa_loss_reference

    trainer = layouts.Trainer([*argv, "--rsa-weight", "0", "--pretrained-checkpoint", initial])
    (model,) = unwrap_model(trainer.model)
    seen = {}
    model.vision_model.register_forward_hook(lambda m, a, out: seen.update(vision=out))
    model.language_model.decoder.register_forward_hook(lambda m, a, out: seen.update(text=out))
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
    lm_loss, num_targets, v, t = 0, 0, [], []
    tokens_of_tiles, in_rows = seen["vision"], seen["text"]
    for b, tiles in enumerate(TILES):
        # The image token at position 0 became so many rows: text position p is row p + shift.
        shift = tiny.layout(tiles).num_tokens(side=2, max_tiles=9) - 1
        learnt = torch.nonzero(batch.loss_mask[b]).flatten()
        lm_loss, num_targets = lm_loss + token_loss[b, shift + learnt].sum(), num_targets + len(learnt)
        if batch.rsa.eligible[b]:
            v.append(torch.cat([tokens_of_tiles[tile] for tile in tiles_of[b]]).mean(0))
            caption = torch.nonzero(batch.rsa.caption_mask[b]).flatten()
            if "caption" in argv:  # by itself
                alone = batch.tokens[b, caption][None]
                model(
                    batch.images[:0],
                    alone,
                    None,
                    None,
                    sound_clips=torch.zeros(0),
                    image_layouts=torch.zeros(0, 6).long(),
                )
                t.append(seen["text"][:, 0].mean(0))
            else:
                t.append(in_rows[shift + caption, b].mean(0))
    v_ND, t_NE = torch.stack(v), torch.stack(t)
    lm_loss = lm_loss / num_targets
    rsa_loss = rsa_loss_reference(
        v_ND.detach() if detached == "v" else v_ND, t_NE.detach() if detached == "t" else t_NE
    )
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters.values(), torch.autograd.grad(lm_loss + 0.3 * rsa_loss, list(parameters.values()))))
    return {
        "lm loss": lm_loss.item(),
        "rsa loss": rsa_loss.item(),
        "gradients": trainer.shards(gradients.__getitem__),
    }


FIRST_TILES, LAST_TILES = [[0], [1], [4], [5]], [[0], [3], [4], [6]]


ALL_TILES = [[0], [1, 2, 3], [4], [5, 6]]
