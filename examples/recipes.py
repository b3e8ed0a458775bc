"""Training settings of a stage, as defaults of Megatron's arguments: any of them is overridden by its flag.

A recipe is a function; a variant is the base and its changes.
"""


def stage_1() -> dict:
    """Stage 1, language-image alignment: the tower and the projector learn, the language model is frozen.

    (paper, section 3.3 and table B.1: batch 256, one epoch, cosine, warm-up 0.03)
    """
    return dict(
        trainable=["vision", "projector"],
        template="plain",
        image_aspect_ratio="square",
        seq_length=2048,  # 729 tokens of an image and its caption
        micro_batch_size=8,
        global_batch_size=256,
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
        eval_interval=100,
        eval_iters=10,
        save_interval=500,
    )


def demo_stage_1() -> dict:
    """Stage 1 of the demo model on rendered scenes (`make demo`): two processes on two CPU cores, four minutes.

    The towers are small and have seen little: they take a larger rate than the paper's. The weight is such that on
    the training split's first batch the weighted RSA loss is about the LM loss: 1500 x 0.001 against 1.1. (The
    paper's 0.01 belongs to its model's distances; here it would be 15 against 1.1.)
    """
    return stage_1() | dict(
        rsa_weight=0.001,
        seq_length=160,
        micro_batch_size=16,
        global_batch_size=32,
        train_iters=300,
        lr=1e-3,
        eval_interval=120,  # at 120 and 240; Megatron evaluates once more at the end
        eval_iters=5,
        log_interval=10,
        save_interval=150,
    )


def demo_parts() -> dict:
    """Before stage 1: the demo's decoder and tower, each for itself (pretrain_demo_parts.py); two minutes."""
    return demo_stage_1() | dict(
        trainable=["vision", "embeddings", "language"],
        train_iters=200,
        lr=2e-3,
        eval_interval=1000,
        eval_iters=0,
        mutual_knn_samples=0,
    )


#: The recipe of a stage, and those of models that need another.
STAGES = {"1": stage_1}
RECIPES = {("demo", "1"): demo_stage_1}


def recipe(model: str, stage: str) -> dict:
    """The settings of a stage for a model; ValueError names the stages."""
    if stage not in STAGES:
        raise ValueError(f"--stage {stage}: no such recipe; there is {', '.join(STAGES)}")
    return RECIPES.get((model, stage), STAGES[stage])()
