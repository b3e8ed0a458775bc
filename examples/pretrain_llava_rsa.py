"""Train a LLaVA model with the RSA loss, on Megatron's own pretrain().

    torchrun --nproc-per-node 2 examples/pretrain_llava_rsa.py --model demo --stage 1 \
        --data-path demo/data/captions --tokenizer-model demo/tokenizer --pretrained-checkpoint demo/parts

--model and --stage set Megatron's arguments; Megatron's own flags override them. --dry-run prints
what would run and stops. Without a CUDA device the same script runs on the CPU.
"""

import os

from rsa_megatron import screen

if __name__ == "__main__":
    screen.begin()  # what Megatron prints goes to a log; before its imports, which warn

from rsa_megatron.training import console, megatron_patches  # isort: skip  # rsa_megatron.training is imported before Megatron
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from rsa_megatron.plugin import RSAPlugin
from rsa_megatron.ranks import end_with_launcher, print_once
from rsa_megatron.training.alignment_scores import AlignmentScores, write_scores
from rsa_megatron.training.arguments import architecture_of, end_with, parse
from rsa_megatron.training.checkpoint_saving import surround_checkpoints
from rsa_megatron.training.learning_rates import LearningRates
from rsa_megatron.training.metrics_file import write_metrics
from rsa_megatron.training.mfu import Utilisation
from rsa_megatron.training.providers import datasets_provider, model_provider
from rsa_megatron.training.run_folder import (
    RunFolder,
    explain_nothing_left,
    write_hugging_face_files,
    write_stage,
)
from rsa_megatron.training.run_summary import format_run
from rsa_megatron.training.train_step import forward_step


def main():
    rsa = RSAPlugin()
    args = parse(rsa)
    if "RANK" not in os.environ and not args.dry_run:
        end_with(ValueError("start it with torchrun: torchrun --nproc-per-node 1 examples/pretrain_llava_rsa.py ..."))
    architecture = architecture_of(args)
    print_once(format_run(args, rsa.config, architecture))
    if args.dry_run:
        return
    if nothing_left := explain_nothing_left(args):
        return print_once(nothing_left)
    end_with_launcher()
    console.open_log(args)
    megatron_patches.repair()
    megatron_patches.repair_log()
    rates = LearningRates(args)
    rates.apply()
    utilisation = Utilisation(args, architecture)
    utilisation.apply()
    print_once(utilisation.description)
    write_metrics(args)
    console.apply(args)
    surround_checkpoints()
    with RunFolder(args, lambda: write_hugging_face_files(args, architecture), lambda: write_stage(args)) as folder:
        pretrain(
            pretrain_cfg_container_from_args(args),
            datasets_provider,
            ModelType.encoder_or_decoder,
            rates.wrap_forward_step(rsa.wrap_forward_step(utilisation.wrap_forward_step(forward_step))),
            folder.wrap_model_provider(rsa.wrap_model_provider(model_provider)),
            non_loss_data_func=AlignmentScores(rsa) if args.mutual_knn_samples else None,
            process_non_loss_data_func=write_scores if args.mutual_knn_samples else None,
        )
        # Not reached at --exit-interval, --exit-duration and on a signal, which end the process.
        write_stage(args, finished=args.train_iters)


if __name__ == "__main__":
    main()
