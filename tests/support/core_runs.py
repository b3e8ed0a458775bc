"""Launches of core_job.py under the megatron-core of this process, and the plain model with eq. 6 written out beside it.

    PYTHONPATH=FOLDER/OF/ANOTHER/CORE:$PYTHONPATH python -m tests.support.core_runs PLAN RESULTS

PLAN (JSON) names launches: {name: [function, world size, its arguments]}; RESULTS gets what each gave, by rank, or its
failure as a string. Megatron is loaded once, in the process that all ranks are forked from.

Shapes: T tiles of P tokens, B rows of L positions once images are put in, N pairs, D and E widths of v and t.
"""

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

from rsa_megatron import megatron_on_cpu

megatron_on_cpu.enable()

import megatron.core
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from rsa_megatron.alignment.loss import rsa_loss_reference
from tests.support import core_job, processes

torch.set_num_threads(1)


def version() -> str:
    return megatron.core.__version__


def job(argv: list[str], with_rsa: bool) -> list[dict[str, float]]:
    quick_checkpoints()
    return core_job.main(argv, with_rsa)


def quick_checkpoints() -> None:
    """Megatron's writer asks for a manager process of its own and would load Megatron in it once more: seconds in each rank."""
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def plain(argv: list[str], num_ranks: int, weight: float, folder: str, mistake: str = "") -> list[dict[str, float]]:
    """The job's model on one process, without the plugin and without DDP, schedules or Megatron's optimizer.

    Writes the weights it starts from, folder/start, and the first gradient, folder/gradients.

    Args:
        num_ranks: data-parallel ranks whose parts of the batch it takes.
        mistake: "each rank alone" or "one row early", to see that it would be seen; other names make none.
    """
    quick_checkpoints()
    core_job.args = args = core_job.add_job_arguments(argparse.ArgumentParser()).parse_args(argv)
    core_job.initialize()
    model = core_job.model_provider()
    core_job.save(Path(folder, "start"), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0)
    figures = []
    for iteration in range(args.train_iters):
        optimizer.zero_grad()
        loss, figures_now = plain_loss(model, iteration, num_ranks, weight, mistake)
        loss.backward()
        if iteration == 0:
            core_job.save_gradients(Path(folder, "gradients"), model, lambda parameter: parameter.grad)
        optimizer.step()
        figures.append(figures_now)
    return figures


def plain_loss(model, iteration: int, num_ranks: int, weight: float, mistake: str) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step over all ranks and micro-batches: eq. 6, with the LM loss as --loss-form takes it."""
    args, seen = core_job.args, []
    for index in range(core_job.NUM_MICRO_BATCHES):
        seen.append(
            [plain_forward(model, core_job.micro_batch(iteration, index, rank), mistake) for rank in range(num_ranks)]
        )
    sums = torch.stack([torch.stack([rank["sum"] for rank in ranks]) for ranks in seen])
    counts = torch.stack([torch.stack([rank["count"] for rank in ranks]) for ranks in seen])
    kernels = [[torch.cat([rank[side] for rank in ranks]) for side in "vt"] for ranks in seen]
    rsa = torch.stack([rsa_loss_reference(v_ND, t_NE) for v_ND, t_NE in kernels])
    if mistake == "each rank alone":
        rsa = torch.stack([torch.stack([rsa_loss_reference(r["v"], r["t"]) for r in ranks]).mean() for ranks in seen])
    if args.loss_form == "per-token":
        language, share = sums.sum() / counts.sum(), counts.sum(dim=1) / counts.sum()
    else:
        language, share = (sums / counts).mean(), torch.full((len(seen),), 1 / len(seen))
    logged = language if args.loss_form == "two" else sums.sum() / counts.sum()
    num_pairs = sum(len(v_ND) for v_ND, _ in kernels) / len(kernels)
    figures = {"lm loss": logged.item(), "rsa loss": rsa.mean().item(), "rsa pairs": num_pairs}
    return language + weight * (share * rsa).sum(), figures


def plain_forward(model, batch: dict[str, Tensor], mistake: str) -> dict[str, Tensor]:
    """Sum and number of the LM losses, and v and t of the samples with one image, by autograd from forward hooks."""
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in (("tower", model.vision_model), ("decoder", model.language_model.decoder))
    ]
    tokens, num_tiles = batch["tokens"], batch["num_tiles"]
    position_ids = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss_BL, mask_BL = model(
        batch["imgs"], tokens, position_ids, None, batch["labels"], batch["loss_mask"], num_image_tiles=num_tiles
    )
    for hook in hooks:
        hook.remove()
    tower_TPD = outputs["tower"]
    if model._drop_vision_class_token:
        tower_TPD = tower_TPD[:, model.vision_model.class_token_len :]
    v, t, tiles = [], [], num_tiles.tolist()
    tile = 0
    for b, row in enumerate(tokens.tolist()):
        own = [tiles.pop(0) for token in row if token == core_job.IMAGE_TOKEN]
        if len(own) == 1:
            rows = caption_rows(row, batch["loss_mask"][b], own[0] * model.img_seq_len, mistake)
            v.append(tower_TPD[tile].mean(dim=0))
            t.append(outputs["decoder"][rows, b].mean(dim=0))
        tile += sum(own)
    count = mask_BL.sum()
    return {
        "sum": (loss_BL * mask_BL).sum(),
        "count": count,
        "v": torch.stack(v).double(),
        "t": torch.stack(t).double(),
    }


def caption_rows(row: list[int], loss_mask: Tensor, image_length: int, mistake: str) -> list[int]:
    """Positions, in the row with its image put in, of the tokens that were predicted: those after one of the loss mask."""
    positions, position = [], 0
    for p, token in enumerate(row):
        if p > 0 and loss_mask[p - 1] > 0:
            positions.append(position - (mistake == "one row early"))
        position += image_length if token == core_job.IMAGE_TOKEN else 1
    return positions


def launch(function: str, world_size: int, arguments: list):
    try:
        return processes.run(globals()[function], world_size, *arguments, timeout=240)
    except processes.Failed as failure:
        return f"{failure}\n{failure.output[-3000:]}"


if __name__ == "__main__":
    # Forked from here, where Megatron is loaded already.
    processes.CONTEXT = multiprocessing.get_context("fork")
    plan, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps({name: launch(*what) for name, what in json.loads(plan.read_text()).items()}))
