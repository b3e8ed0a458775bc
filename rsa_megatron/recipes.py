"""Training settings of a stage, as defaults of Megatron's arguments: any of them is overridden by its flag.

A recipe is a function; a variant is the base and its changes. No stage's recipe says how long: a run without --train-iters
is one pass over its data, as all of the paper's stages are. (The Makefile says it for the demo.)

Where the numbers come from: the RSA paper's table B.1 and section 5.1, "We follow LLaVA-OneVision training configuration
with minor differences on learning rate at Stage-1"; so what the table leaves out is LLaVA-OneVision's (LLaVA-NeXT,
scripts/train/*.sh and Hugging Face's Trainer: AdamW with betas 0.9 and 0.999, no weight decay, gradients clipped at 1,
cosine to 0, warm-up 0.03). As the table is extracted from a PDF, three of its rows have fewer entries than there are stages.
They are read as: rate of the tower 2e-6 in all stages; rate of projector and language model 2e-6 in stage 1 (where
LLaVA-OneVision has 1e-3, with a frozen tower) and 1e-5 in 1.5 and 2; batch 256 in all (LLaVA-OneVision: 512 in stage 1).
The paper's 224 GPUs = 2^5 * 7 do not divide a batch of 256: use 32 * 7 (TP x PP = 7) or another batch or number of GPUs. Where rows
are packed (1.5 and 2) the batch counts rows, and is chosen so that a step has about the 256 samples to which the rates belong.

Each docstring's command fits the GPUs that it names by the planner's estimate (rsa-megatron plan; a test asks it), with
Transformer Engine's layers, rows of --seq-length and the most tiles. It has not been run at that size. Expected times are arithmetic, not
measured: 6 operations a trained parameter and token, 4 where gradients only pass through, at 40 % of an A100's 312 TFLOPS, and
an average row as it is named.
"""


def stage_1() -> dict:
    """Stage 1, language-image alignment: tower and projector are trained, RSA is on, the language model is frozen.

        torchrun --nproc-per-node 8 examples/pretrain_llava_rsa.py --model llava-ov-7b --stage 1 --bf16 \\
            --data-path data/stage1.yaml --tokenizer-model CONVERTED/hf --pretrained-checkpoint CONVERTED --save runs/stage1

    558K captions. 8 A100 of 80 GB: about 5 hours for the 7B (rows of 900 positions); 51 GiB each. Not packed: a row of 2048 would hold
    two captions, 0.88 of it, and a step would take as long: captions are about as long as one another.
    """
    return dict(
        trainable=["vision", "projector"],
        template="plain",
        label_style="llava",
        image_aspect_ratio="square",  # 384 px, 729 tokens
        seq_length=2048,  # an image and its caption
        micro_batch_size=4,  # of the 7B on 80 GB; 8 would need 85 GiB
        packing_buffer_size=0,  # two samples of 900 positions would fill a packed row to 0.88; here micro-batches are as full
        global_batch_size=256,
        # Adam's state over the data-parallel ranks: of the 7B trained whole it is 91 GB, and a GPU has 80.
        use_distributed_optimizer=True,
        dist_ckpt_optim_fully_reshardable=True,  # resumes on another number of ranks
        lr=2e-6,
        min_lr=0.0,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.03,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_eps=1e-8,
        clip_grad=1.0,
        num_workers=2,
        log_interval=1,
        eval_interval=200,  # mutual-kNN on 1000 pairs takes less than 1 % of that (benchmarks/README.md)
        eval_iters=10,
        save_interval=500,
    )


def revision() -> dict:
    """ReVision's stage 1 (arXiv 2602.07026, section 5.1): captions only; the projector is trained, all else is frozen.

        rsa-megatron realign transform --operator OPERATOR --encoder ENCODER --data captions.jsonl --side text --out data/revision
        torchrun --nproc-per-node 8 examples/pretrain_llava_rsa.py --model llava-ov-7b --stage revision --bf16 \\
            --data-path data/revision --image-embedding-width 1280 --tokenizer-model CONVERTED/hf \\
            --pretrained-checkpoint CONVERTED --save runs/revision

    1M captions. On 8 GPUs of 80 GB; 47 GiB each. What of it the authors' scripts say and the paper does not: 576 positions, the
    template, the length of a row.
    RSA is off, as the paper has none; with --rsa-weight it reaches the projector through t.
    """
    return stage_1() | dict(
        trainable=["projector"],
        rsa_weight=0.0,
        image_positions=576,
        lr=5e-4,
    )


def stage_1_5() -> dict:
    """Stage 1.5, high-quality knowledge: all modules are trained, on captions (RSA), written words and text; AnyRes up to 5 x 729.

        STAGE=1.5 DATA=data/stage1_5.yaml MODEL=llava-ov-7b TOKENIZER=CONVERTED/hf PRETRAINED=runs/stage1 OUT=runs/stage1_5 \\
            sbatch --nodes 24 examples/slurm/multi_node.sbatch --tensor-model-parallel-size 2 --sequence-parallel

    4M samples. 192 A100 of 80 GB: about 6 hours for the 7B (samples of 2750 positions, 2.8 of them a packed row, one row a rank and
    step); 51 GiB each. On 8 of them the same flags need 62 GiB.
    """
    return stage_1() | dict(
        trainable=["vision", "projector", "embeddings", "language"],
        template="qwen_1_5",
        image_aspect_ratio="anyres",
        # LLaVA-OneVision's list (its pairs are width, height) in its order: of grids that keep as much of an image, the first is taken.
        image_grids=[(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)],
        seq_length=8192,  # LLaVA-OneVision's model_max_length is 32768
        packing_buffer_size=1000,
        micro_batch_size=1,
        global_batch_size=96,  # rows, of about 270 samples; divides over 2, 4, 8, 16, 32, 48 and 96 ranks
        eval_iters=25,  # of 96 samples each: evaluation's rows are not packed
        lr=1e-5,
        vision_lr=2e-6,
    )


def stage_2() -> dict:
    """Stage 2, visual instruction tuning: stage 1.5 with finer grids, up to 10 x 729 tokens, and without RSA.

        STAGE=2 DATA=data/stage2.yaml MODEL=llava-ov-7b TOKENIZER=CONVERTED/hf PRETRAINED=runs/stage1_5 OUT=runs/stage2 \\
            sbatch --nodes 24 examples/slurm/multi_node.sbatch --tensor-model-parallel-size 4 --sequence-parallel

    3.2M samples. 192 A100 of 80 GB: about 6 hours for the 7B (samples of 3450 positions, 4.5 of them a packed row); 44 GiB each. On 8 of
    them the same flags need 54 GiB.
    """
    return stage_1_5() | dict(
        rsa_weight=0.0,
        image_grids=None,  # all of the model's, 1 x 1 to 6 x 6
        seq_length=16384,  # the largest image is 8765 positions
        global_batch_size=48,  # rows, of about 220 samples; divides over 2, 4, 8, 16 and 48 ranks
        eval_iters=50,
    )


def unpack(settings: dict) -> dict:
    """Return a stage that packs with a sample a row: the paper's 256 samples a step, and about as many in an evaluation."""
    if not settings.get("packing_buffer_size"):
        return settings
    return settings | dict(packing_buffer_size=0, global_batch_size=256, eval_iters=stage_1()["eval_iters"])


def demo_stage_1() -> dict:
    """Stage 1 of the demo model on rendered scenes (`make demo`): 200 iterations on two CPU cores, two minutes.

    The towers are small and have seen little: they take a larger rate than the paper's. The weight is such that on
    the training split's first batch the weighted RSA loss is about the LM loss: 1500 x 0.001 against 1.1. (The
    paper's 0.01 belongs to its model's distances; here it would be 15 against 1.1.)
    """
    return stage_1() | dict(
        rsa_weight=0.001,
        seq_length=160,
        micro_batch_size=16,
        global_batch_size=32,
        use_distributed_optimizer=False,
        lr=1e-3,
        eval_interval=80,  # at 80 and 160, and at the end
        eval_iters=5,
        log_interval=10,
        save_interval=100,
    )


def demo_revision() -> dict:
    """ReVision's stage 1 of the demo (`make revision`): an embedding in 8 positions.

    The rate is high because an embedding's numbers are small, 1 / sqrt(D) each: at 2e-3 a projector learns first what to say
    whatever the image is. On paired images the loss of iterations 151 to 160 was 0.409 at 2e-3, 0.405 at 4e-3, 0.390 at 1e-2 and
    0.392 at 3e-2.
    """
    sizes = (
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "eval_iters",
        "log_interval",
        "use_distributed_optimizer",
    )
    return (
        revision()
        | {name: demo_stage_1()[name] for name in sizes}
        | dict(
            image_positions=8,
            lr=1e-2,
            eval_interval=100,
            save_interval=100,
        )
    )


def demo_stage_1_5() -> dict:
    """Stage 1.5 of the demo (`make demo-stages`): captions, written words and texts, grids of up to 2 x 2 tiles."""
    return _demo(stage_1_5()) | dict(rsa_weight=demo_stage_1()["rsa_weight"])


def demo_stage_2() -> dict:
    """Stage 2 of the demo (`make demo-stages`): captions and questions, without RSA."""
    return _demo(stage_2())


def _demo(stage: dict) -> dict:
    """A later stage in the demo's sizes; the tower at a fifth of the others' rate, as the paper has it."""
    sizes = ("global_batch_size", "eval_iters", "log_interval", "use_distributed_optimizer")
    return (
        stage
        | {name: demo_stage_1()[name] for name in sizes}
        | dict(
            image_grids=None,
            seq_length=448,  # 180 + 12 positions of an image, and a text
            packing_buffer_size=0,  # a packed row of 448 would hold 1.5 samples; of 1792, five to seven (docs/training.md)
            micro_batch_size=8,
            lr=5e-4,
            vision_lr=1e-4,
            eval_interval=1000,  # at the end
            save_interval=20,
        )
    )


def demo_parts() -> dict:
    """Before stage 1: the demo's decoder and tower, each for itself (pretrain_backbones.py); two minutes."""
    return demo_stage_1() | dict(
        rsa_weight=0.0,
        trainable=["vision", "embeddings", "language"],
        train_iters=200,
        lr=2e-3,
        eval_interval=1000,
        eval_iters=0,
        mutual_knn_samples=0,
    )


#: The recipe of a stage, and those of models that need another.
STAGES = {"revision": revision, "1": stage_1, "1.5": stage_1_5, "2": stage_2}
RECIPES = {
    ("demo", "revision"): demo_revision,
    ("demo", "1"): demo_stage_1,
    ("demo", "1.5"): demo_stage_1_5,
    ("demo", "2"): demo_stage_2,
}


def recipe(model: str, stage: str) -> dict:
    """The settings of a stage for a model; ValueError names the stages."""
    if stage not in STAGES:
        raise ValueError(f"--stage {stage}: no such recipe; there is {', '.join(STAGES)}")
    return RECIPES.get((model, stage), STAGES[stage])()
