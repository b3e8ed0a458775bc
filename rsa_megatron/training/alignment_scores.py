"""Scores of alignment at each evaluation: pretrain()'s callbacks for figures that are not a loss."""

import time

from megatron.core import mpu
from megatron.training import get_args, get_wandb_writer
from megatron.training.utils import is_last_rank

from rsa_megatron import screen
from rsa_megatron.alignment.metrics import MUTUAL_KNN, NEIGHBOUR_METRICS
from rsa_megatron.evaluation.online import Score, measure_alignment, read_pairs
from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.training.providers import validation_loader


class AlignmentScores:
    """For Megatron's non_loss_data_func: at each evaluation, image only against caption only on the same validation pairs."""

    def __init__(self, rsa: RSAPlugin):
        self._rsa = rsa
        self._pairs = None

    def __call__(self, model) -> dict[str, float]:
        args, begin = get_args(), time.monotonic()
        if self._pairs is None:
            self._pairs = self._read(args, model)
        result = measure_alignment(
            model,
            self._pairs,
            num_samples=args.mutual_knn_samples,
            micro_batch_size=args.eval_micro_batch_size,
            seq_length=args.seq_length,
            k=args.mutual_knn_k,
            layer_pairs=args.mutual_knn_layers,
            metrics=args.eval_metrics,
        )
        return log_scores(args, *result, time.monotonic() - begin) if result else {}

    def _read(self, args, model) -> list:
        reads = mpu.get_tensor_model_parallel_rank() == 0 and (
            mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
        )
        # Base tiles alone are measured; with anyres the others would be cut for nothing.
        loader = validation_loader(args, say_skipped=False, image_aspect_ratio="square") if reads else None
        return read_pairs(
            model,
            loader and loader.one_pass(),
            num_samples=args.mutual_knn_samples,
            micro_batch_size=args.eval_micro_batch_size,
            base_tile=self._rsa.config.base_tile,
        )


def log_scores(
    args, scores: dict[tuple[str, tuple[int, int]], Score | str], num_pairs: int, seconds: float
) -> dict[str, float]:
    """Show the scores, each beside its chance, and return both by the names that they have there.

    What has no score is in the log with the reason, and not among the figures.
    """
    # args.iteration is that of the checkpoint; where nothing is left to train, the current one stays 0.
    iteration = args.iteration if args.skip_train else max(args.iteration, args.curr_iteration + 1)
    named = {}
    for (metric, pair), score in scores.items():
        layers = "" if pair == (-1, -1) else " {}:{}".format(*pair)
        k = f"@{args.mutual_knn_k}" * (metric in NEIGHBOUR_METRICS)
        start = f" validation {metric}{k} at iteration {iteration} | {metric}{layers}"
        if isinstance(score, str):
            _show(f"{start} has no value: {score} |")
            continue
        named[metric + layers] = score.value
        # That of mutual-kNN is the same for all layers.
        named[f"{metric} chance" if metric == MUTUAL_KNN else f"{metric}{layers} chance"] = score.chance
        _show(
            f"{start} value: {score.value:.4f} | {num_pairs} pairs, image only against caption only, {seconds:.1f} s | "
            f"chance {score.chance:.4f} |"
        )
    return named


def write_scores(scores: dict[str, float], iteration: int, writer) -> None:
    """Megatron's process_non_loss_data_func: to metrics.jsonl, TensorBoard and, where it is on, wandb."""
    for key, score in scores.items():
        writer.add_scalar(f"{key} validation", score, iteration)
        if get_wandb_writer() and is_last_rank():
            get_wandb_writer().log({f"{key} validation": score}, iteration)


def _show(line: str) -> None:
    if is_last_rank():
        screen.show(line)
