"""Packed rows against a row a sample: the samples that both train on, and the runs that are compared."""

from pathlib import Path

from tests.support import context_parallel_attention, layouts
from tests.support.layouts import PP, SINGLE, TP, Layout, largest_difference
from tests.support.packed_batches import as_packed_row, as_rows, sample, use_packed_rows
from tests.support.parity import RECOMPUTE, Parity

SP = (*TP, "--sequence-parallel")
_CP = ("--context-parallel-size", "2")
CP = Layout("CP=2", 2, 1, _CP)
PP4 = Layout("PP=4", 4, 1, ("--pipeline-model-parallel-size", "4"))

# Each layout once, with either number of micro-batches, and what else must not change anything.
CASES = [
    (layouts.layout_of("DP=2"), 4, ()),
    (layouts.layout_of("TP=2"), 1, RECOMPUTE),
    (layouts.layout_of("TP=2 SP"), 4, ("--recompute-granularity", "selective")),
    (layouts.layout_of("PP=2"), 1, RECOMPUTE),
    (PP4, 4, ()),
    (layouts.layout_of("PP=2 VPP=2"), 4, ()),
    (layouts.layout_of("TP=2 PP=2"), 1, ("--recompute-granularity", "selective")),
    (Layout("TP=2 SP PP=2", 4, 1, (*SP, *PP)), 4, ()),
    (layouts.layout_of("DP=2 PP=2"), 4, ("--use-distributed-optimizer", "--save-interval", "1000")),
]

# With a stand-in for Transformer Engine's attention (context_parallel_attention.py).
CP_CASES = [
    (Layout("CP=4", 4, 1, ("--context-parallel-size", "4")), 1),
    (Layout("CP=2 DP=2", 4, 2, _CP), 4),
    (Layout("CP=2 TP=2 SP", 4, 1, (*_CP, *SP)), 4),
    (Layout("CP=2 PP=2", 4, 1, (*_CP, *PP)), 4),
]

# Of each micro-batch the samples of two rows, or of one that has them all, as num_tokens, tiles of its images, tokens before these,
# and whether it takes part in RSA.
_KINDS = [
    # Three samples that begin with an image behind others, one with two images, one of text.
    [[(12, (3,), 0, True), (10, (1, 2), 3, False)], [(9, (1,), 0, True), (7, (), 0, False), (11, (2,), 0, True)]],
    # As evaluation has them, a row a sample: two rows, or one on each of two ranks.
    [[(11, (2,), 0, True)], [(14, (1,), 0, True)]],
    # Text alone; a row of one sample.
    [[(6, (), 0, False), (9, (), 0, False)], [(12, (), 0, False)]],
    # A row without a sample.
    [[(12, (3,), 0, True), (8, (1,), 0, True), (8, (2,), 2, False)], []],
]
_UNPACKED = 1  # of these


def samples(num_micro_batches: int) -> list[list[list[list]]]:
    """Of each iteration, micro-batch and row."""
    return [
        [
            [
                [sample(1000 * i + 100 * m + 10 * r + number, *kind) for number, kind in enumerate(row)]
                for r, row in enumerate(_KINDS[m])
            ]
            for m in range(num_micro_batches)
        ]
        for i in range(2)
    ]


def _flags(demo: Path, rows: int, num_micro_batches: int, *flags: str) -> list[str]:
    return [
        *("--data-path", str(demo / "data" / "captions"), "--tokenizer-model", str(demo / "tokenizer")),
        *("--micro-batch-size", "1", "--global-batch-size", str(rows * num_micro_batches)),
        *("--calculate-per-token-loss", "--seq-length", "160", *flags),
    ]


class PackedParity:
    """The run of one process with a row a sample, made once for each setting, and comparisons with it."""

    def __init__(self, parity: Parity):
        self._demo, self._initial, self._folder = parity.demo, parity.initial, parity.folder
        self._references = {}

    def train(self, layout: Layout, batches, *flags: str, sabotage=None) -> layouts.Run:
        """Train on batches[iteration][micro-batch]: a list of rows, one a data-parallel rank, or a batch of whole rows."""
        size = layout.data_parallel_size
        flags = _flags(self._demo, size, len(batches[0]), *flags)
        return layouts.run(layout, batches, flags, load=self._initial, sabotage=sabotage or use_packed_rows)

    def reference(self, num_micro_batches: int, rsa_weight: float) -> layouts.Run:
        key = num_micro_batches, rsa_weight
        if key not in self._references:
            rows = [[as_rows(sum(one, [])) for one in step] for step in samples(num_micro_batches)]
            self._references[key] = self.train(SINGLE, rows, "--rsa-weight", str(rsa_weight), sabotage=packs_no_rows)
        return self._references[key]

    def differences(
        self,
        layout: Layout,
        num_micro_batches: int,
        *flags: str,
        rsa_weight=0.0,
        last_tokens=1,
        multiple=None,
        sabotage=None,
    ) -> dict[str, float]:
        """Largest relative differences from a row a sample, of figures, gradients and parameters."""
        whole = layout.data_parallel_size == 1
        if multiple is None:  # what context parallelism asks for
            size = int(dict(zip(layout.flags, layout.flags[1:])).get("--context-parallel-size", 1))
            multiple = 2 * size if size > 1 else 1

        def rows_of(m, one):
            groups = [sum(one, [])] if whole else one
            if m == _UNPACKED:
                return [as_rows(group) for group in groups]
            return [as_packed_row(group, last_tokens=last_tokens, multiple=multiple) for group in groups]

        batches = [[rows_of(m, one) for m, one in enumerate(step)] for step in samples(num_micro_batches)]
        if "--save-interval" in flags:
            flags = (*flags, "--save", str(self._folder))
        actual = self.train(layout, batches, "--rsa-weight", str(rsa_weight), *flags, sabotage=sabotage)
        return differences(actual, self.reference(num_micro_batches, rsa_weight))


def differences(actual: layouts.Run, expected: layouts.Run) -> dict[str, float]:
    found = {
        name: max(abs(a[name] - e[name]) / max(abs(e[name]), 1e-30) for a, e in zip(actual.losses, expected.losses))
        for name in expected.losses[0]
        if name == "lm loss" or name.startswith("rsa ")
    }
    found["gradients"], _ = largest_difference(actual.gradients, expected.gradients)
    found["parameters"], _ = largest_difference(actual.parameters, expected.parameters)
    return found


def packs_no_rows() -> None:
    pass


def use_context_parallelism() -> None:
    context_parallel_attention.use()
    use_packed_rows()


# Mistakes.


def no_bounds():
    from rsa_megatron.training import train_step

    use_packed_rows()
    train_step._describe_packed_row = lambda batch, llava: None


def no_bounds_on_the_way():
    """The stages between the first and the last hand bounds on and do not use them."""
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    use_packed_rows()
    right = LLaVAModel.forward

    def forward(self, *args, packed_seq_params=None, **kwargs):
        uses = self.pre_process or self.post_process
        return right(self, *args, packed_seq_params=packed_seq_params if uses else None, **kwargs)

    LLaVAModel.forward = forward


def first_stage_reads_other_rows():
    from rsa_megatron.models import packed_rows

    use_packed_rows()
    right = packed_rows.put_on_bounds
    packed_rows.put_on_bounds = lambda hidden, packed, num_rows: right(
        hidden, packed_rows.make_packed_seq_params(packed.sequence_lengths[::-1], len(hidden)), num_rows
    )


def row_divided_as_one_sequence():
    """Each context-parallel rank gets two parts of the row, not of each of its sequences."""
    use_context_parallelism()
    right = context_parallel_attention.partitioned_indices
    context_parallel_attention.partitioned_indices = lambda bounds, *args: right(bounds[[0, -1]], *args)
    context_parallel_attention.use()
