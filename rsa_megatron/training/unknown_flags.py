"""Flags that the parser does not know: what they are called here, or which are spelled like them.

Many come from other trainers' scripts: Hugging Face's Trainer, and LLaVA's scripts on it.
"""

import argparse
import difflib

#: What other trainers call it, and what it is here.
ELSEWHERE = {
    # transformers.TrainingArguments
    "--learning-rate": "--lr",
    "--per-device-train-batch-size": "--micro-batch-size",
    "--per-device-eval-batch-size": "--eval-micro-batch-size",
    "--train-batch-size": "--global-batch-size",
    "--gradient-accumulation-steps": "--global-batch-size (micro-batch x ranks x steps)",
    "--num-train-epochs": "--train-iters (without it a run is one pass; a mixture's repetitions make more)",
    "--epochs": "--train-iters (without it a run is one pass; a mixture's repetitions make more)",
    "--max-steps": "--train-iters",
    "--output-dir": "--save",
    "--save-steps": "--save-interval",
    "--save-strategy": "--save-interval",
    "--save-total-limit": "--save-retain-interval",
    "--logging-steps": "--log-interval",
    "--logging-dir": "--tensorboard-dir",
    "--eval-steps": "--eval-interval",
    "--eval-strategy": "--eval-interval and --eval-iters",
    "--evaluation-strategy": "--eval-interval and --eval-iters",
    "--warmup-ratio": "--lr-warmup-fraction",
    "--warmup-steps": "--lr-warmup-iters",
    "--lr-scheduler-type": "--lr-decay-style",
    "--max-grad-norm": "--clip-grad",
    "--adam-epsilon": "--adam-eps",
    "--optim": "--optimizer",
    "--resume-from-checkpoint": "--load",
    "--dataloader-num-workers": "--num-workers",
    "--dataloader-drop-last": "--drop-last",
    "--report-to": "--tensorboard-dir or --wandb-project",
    "--run-name": "--wandb-exp-name",
    "--gradient-checkpointing": "--recompute-activations",
    "--deepspeed": "--use-distributed-optimizer",
    "--fsdp": "--use-distributed-optimizer",
    "--do-train": "left out, as a run trains",
    "--do-eval": "--eval-iters",
    "--tf32": "left out",
    "--remove-unused-columns": "left out",
    # LLaVA's and LLaVA-NeXT's scripts
    "--model-name-or-path": "--model (a folder in Hugging Face format) and --pretrained-checkpoint (its weights, by rsa-megatron convert)",
    "--tokenizer-name": "--tokenizer-model",
    "--version": "--template",
    "--model-max-length": "--seq-length",
    "--max-seq-length": "--seq-length",
    "--image-folder": "left out: rsa-megatron data pack --images takes it",
    "--vision-tower": "--model, which has a tower",
    "--mm-vision-tower-lr": "--vision-lr",
    "--mm-projector-lr": "--projector-lr",
    "--mm-tunable-parts": "--trainable",
    "--tune-mm-mlp-adapter": "--trainable projector",
    "--unfreeze-mm-vision-tower": "--trainable",
    "--freeze-backbone": "--trainable",
    "--pretrain-mm-mlp-adapter": "--pretrained-checkpoint",
    "--image-grid-pinpoints": "--image-grids",
    "--lazy-preprocess": "left out",
    "--group-by-modality-length": "left out",
    "--attn-implementation": "left out: --transformer-impl chooses the layers",
    # short names of Megatron's
    "--batch-size-per-gpu": "--micro-batch-size",
    "--tensor-parallel-size": "--tensor-model-parallel-size",
    "--pipeline-parallel-size": "--pipeline-model-parallel-size",
    "--tp": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
    "--cp": "--context-parallel-size",
}


def explain_unknown(parser: argparse.ArgumentParser, unknown: list[str], words: list[str]) -> str:
    """Say which words of a command line are not known, and of each flag among them what was meant.

    Args:
        unknown: what parse_known_args has left.
        words: the command line.
    """
    known = parser._option_string_actions
    if not unknown[0].startswith("-") and (flag := _find_flag_before(unknown[0], words)) in known:
        if known[flag].nargs == 0:
            return f"{flag} takes no value, and {unknown[0]} is one: it stands alone, or is left out to turn it off"
    said = f"unrecognized arguments: {' '.join(unknown)}"
    flags = dict.fromkeys(word.partition("=")[0] for word in unknown if word.startswith("--"))
    meant = {flag: name for flag in flags if (name := _find_meant(parser, flag))}
    if len(flags) == 1 and meant:
        (name,) = meant.values()
        return f"{said}; did you mean {name}?" if name in known else f"{said}: here it is {name}"
    return said + "".join(f"; {flag} is {name} here" for flag, name in meant.items())


def _find_flag_before(value: str, words: list[str]) -> str | None:
    place = words.index(value) if value in words else 0
    return words[place - 1] if place else None


def _find_meant(parser: argparse.ArgumentParser, flag: str) -> str | None:
    known, dashed = parser._option_string_actions, flag.replace("_", "-")
    if dashed in known:
        return dashed
    if dashed in ELSEWHERE:
        return ELSEWHERE[dashed]
    return next(iter(difflib.get_close_matches(dashed, known, n=1, cutoff=0.75)), None)
