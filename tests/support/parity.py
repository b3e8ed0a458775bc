"""A layout against one process: the batches that both train on, and the largest differences of figures, gradients and parameters."""

from tests.support import layouts, processes, tiny
from tests.support.layouts import LAYOUTS, SINGLE, largest_difference

# Gradients and parameters in fp32: about a hundred roundings of 6e-8 between a weight and the loss, in another order
# in each layout. Largest seen: tests/README.md. A wrong factor is off by 0.1 and more.
TOLERANCE = 2e-5


# The second sees what the optimizer made of the first; parity_table.py takes ten.
NUM_ITERATIONS = 2


# Which of a micro-batch's four samples take part: all; all but one; none of the first rank's; all but the last.
ELIGIBLE = [(1, 0, 1, 1), (1, 1, 1, 1), (0, 0, 1, 1), (1, 1, 1, 0)]


ALL_CASES = [
    (layout, num_micro_batches, per_token, distributed_optimizer)
    for layout in LAYOUTS
    for num_micro_batches in (1, 4)
    for per_token in (False, True)
    for distributed_optimizer in (False, True)
    # Interleaved schedules take a multiple of the pipeline size.
    if not (num_micro_batches == 1 and "VPP" in layout.name)
]


# Of them a cover of every two settings: each layout with both numbers of micro-batches, both losses, and the distributed
# optimizer on and off. (Where both have run, on and off agree in every digit: tests/README.md.)
_ON_AND_OFF = [
    ((1, False, False), (4, True, True)),
    ((1, True, True), (4, False, False)),
    ((1, False, True), (4, True, False)),
    ((1, True, False), (4, False, True)),
]
CASES = [
    (layout, *settings)
    for number, layout in enumerate(LAYOUTS)
    for settings in (((4, False, False), (4, True, True)) if "VPP" in layout.name else _ON_AND_OFF[number % 4])
]


TILES = (1, 3, 1, 2)  # of the samples, where images have several


def case_name(case) -> str:
    layout, num_micro_batches, per_token, distributed_optimizer = case
    names = [layout.name, f"M={num_micro_batches}"]
    names += ["per-token"] * per_token + ["distributed optimizer"] * distributed_optimizer
    return ", ".join(names)


def batches(num_micro_batches: int, per_token: bool) -> list[list]:
    # Without per-token loss Megatron averages over ranks, each divided by its own tokens: equal only for equal counts.
    num_targets = (9, 5, 7, 8) if per_token else (9, 9, 9, 9)
    return [
        [tiny.batch(100 * i + m, ELIGIBLE[m % 4], num_targets=num_targets) for m in range(num_micro_batches)]
        for i in range(NUM_ITERATIONS)
    ]


def flags(demo, num_micro_batches, per_token, distributed_optimizer, data_parallel_size, save) -> list[str]:
    flags = ["--data-path", str(demo / "data" / "captions"), "--tokenizer-model", str(demo / "tokenizer")]
    flags += ["--rsa-weight", "0.3", "--micro-batch-size", str(4 // data_parallel_size)]
    flags += ["--global-batch-size", str(4 * num_micro_batches)]
    flags += ["--calculate-per-token-loss"] * per_token
    if distributed_optimizer:
        flags += ["--use-distributed-optimizer", "--save", str(save), "--save-interval", "1000"]
    return flags


class Parity:
    """Runs of the one-process reference, each made once, and comparisons with them."""

    def __init__(self, demo, folder):
        self.demo, self.folder, self.references = demo, folder, {}
        self.initial = folder / "initial"
        processes.run(_save_initial_weights, 1, flags(demo, 1, False, False, 1, None), str(self.initial))

    def run(self, case, sabotage=None, options=(), batches_of=None) -> layouts.Run:
        layout, num_micro_batches, per_token, distributed_optimizer = case
        size = layout.data_parallel_size
        return layouts.run(
            layout,
            batches_of(num_micro_batches) if batches_of else batches(num_micro_batches, per_token),
            [*flags(self.demo, num_micro_batches, per_token, distributed_optimizer, size, self.folder), *options],
            load=self.initial,
            sabotage=sabotage,
        )

    def reference(self, case, options=(), batches_of=None) -> layouts.Run:
        _, num_micro_batches, per_token, _ = case
        key = (num_micro_batches, per_token, batches_of, *options)
        if key not in self.references:
            self.references[key] = self.run((SINGLE, num_micro_batches, per_token, False), None, options, batches_of)
        return self.references[key]

    def differences(self, case, sabotage=None, options=(), batches_of=None) -> dict[str, float]:
        """Largest relative differences between a layout and one process."""
        return self.differences_of(self.run(case, sabotage, options, batches_of), case, options, batches_of)

    def differences_of(self, actual: layouts.Run, case, options=(), batches_of=None) -> dict[str, float]:
        """Those of a run that was made already."""
        expected = self.reference(case, options, batches_of)
        found = {
            name: max(abs(a[name] - e[name]) / max(abs(e[name]), 1e-30) for a, e in zip(actual.losses, expected.losses))
            for name in expected.losses[0]
            # How far rows are filled up differs from layout to layout, and with it what the copies add to them.
            if name == "lm loss" or (name.startswith("rsa ") and name != "rsa extra positions")
        }
        found["gradients"], _ = largest_difference(actual.gradients, expected.gradients)
        found["parameters"], _ = largest_difference(actual.parameters, expected.parameters)
        return found


def _save_initial_weights(argv, folder):
    from megatron.training.checkpointing import save_checkpoint

    trainer = layouts.Trainer([*argv, "--save", folder, "--save-interval", "1000", "--no-save-optim", "--no-save-rng"])
    save_checkpoint(0, trainer.model, None, None, 0)


RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")


def of_grids(num_micro_batches) -> list[list]:
    return [[tiny.batch(100 * i + m, ELIGIBLE[m % 4], tiles=TILES) for m in range(num_micro_batches)] for i in range(2)]


def of_texts(num_micro_batches) -> list[list]:
    return [[tiny.text_batch(100 * i + m) for m in range(num_micro_batches)] for i in range(2)]


def some_of_texts(num_micro_batches) -> list[list]:
    with_images = of_grids(num_micro_batches)
    return [[texts[0], *images[1:]] for texts, images in zip(of_texts(num_micro_batches), with_images)]


def of_questions(num_micro_batches) -> list[list]:
    """Images that are no pairs: the kernels are empty."""
    return [[tiny.batch(100 * i + m, (0, 0, 0, 0), tiles=TILES) for m in range(num_micro_batches)] for i in range(2)]


def of_every_kind(num_micro_batches) -> list[list]:
    """Captions, questions about an image, texts, and an empty row, as the last batch of an epoch has them; two pairs in each."""
    kinds = dict(eligible=(1, 0, 1, 0), tiles=(3, 1, 1, 0), num_targets=(9, 7, 8, 5))
    others = dict(eligible=(0, 1, 0, 1), tiles=(0, 2, 0, 1), num_targets=(0, 9, 8, 7))
    return [
        [tiny.batch(100 * i + m, **(others if m % 2 else kinds)) for m in range(num_micro_batches)] for i in range(2)
    ]


# A parameter that has no gradient would be waited for, and asserted, when gradients are reduced as they come.
OVERLAP = ("--overlap-grad-reduce",)


CAPTION = ("--rsa-text-source", "caption")


# Of the tower's 2 layers and the decoder's 4: last with last; layers of the first stage of two with either; what goes into the
# first layers. With VPP=2 the decoder's layers lie one on each of four chunks.
LAYERS = ("--rsa-layers", "-1:-1,-2:1@0.5,1:3@2,0:0@0.25,-1:2")


PAIRS = [(-1, -1, 1.0), (-2, 1, 0.5), (1, 3, 2.0), (0, 0, 0.25), (-1, 2, 1.0)]


WHOLE = ("--rsa-scope", "global-batch")
