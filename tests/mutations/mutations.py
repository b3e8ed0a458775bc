"""Mistakes that the tests must notice: each changes one place of the code, and names the tests that are to fail."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    #: the file, from the root of the project
    file: str
    #: what stands there, exactly once, and what takes its place
    old: str
    new: str
    #: files of tests, of which at least one test must fail
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "gradient scale without the data-parallel size",
        "rsa_megatron/hooks/objective.py",
        "scale = tokens.clamp(min=1) * (data_size * context_size * num_micro_batches)",
        "scale = tokens.clamp(min=1) * (context_size * num_micro_batches)",
        ("tests/distributed/test_parity.py",),
    ),
    Mutation(
        "no gradient through the payload",
        "rsa_megatron/hooks/pipeline_payload.py",
        "hi_BF = vector_BF.to(dtype)",
        "hi_BF = vector_BF.to(dtype).detach()",
        ("tests/unit/hooks/test_pipeline_payload.py", "tests/distributed/test_parity.py"),
    ),
    Mutation(
        "the caption's mask shifted by one position",
        "rsa_megatron/hooks/token_positions.py",
        "return lengths_BS.cumsum(dim=1) - 1",
        "return lengths_BS.cumsum(dim=1)",
        ("tests/unit/hooks/test_sample_selection.py", "tests/distributed/test_equation_6.py"),
    ),
    Mutation(
        "sums of sequence-parallel ranks not added up",
        "rsa_megatron/hooks/caption_pooling.py",
        "sum_nE = reduce_from_tensor_model_parallel_region(sum_nE, group=tp)",
        "pass",
        ("tests/distributed/test_parity.py",),
    ),
    Mutation(
        "a resumed run reads its data from the beginning",
        "rsa_megatron/data/loaders.py",
        'self._loader.restore_state_rank(from_plain(state["energon"]))',
        'from_plain(state["energon"])',
        ("tests/distributed/test_resumed_loaders.py",),
    ),
    Mutation(
        "a random generator that ignores its seed",
        "checkpoint_conversion/initial_weights.py",
        "generator = torch.Generator().manual_seed(seed)",
        "generator = torch.Generator().manual_seed(0)",
        ("tests/unit/checkpoint_conversion/test_towers.py",),
    ),
    Mutation(
        "gate and up exchanged in the weight map, both ways",
        "checkpoint_conversion/weight_map.py",
        'for x in ("gate", "up")}',
        'for x in ("up", "gate")}',
        ("tests/distributed/test_hf_parity.py",),
    ),
    Mutation(
        "an AnyRes border a row too thick",
        "rsa_megatron/anyres.py",
        "top = (rows - int(round(self.height * (columns / self.width), 7))) // 2",
        "top = (rows - int(round(self.height * (columns / self.width), 7)) + 1) // 2",
        ("tests/unit/test_anyres.py",),
    ),
    Mutation(
        "of equally near neighbours the larger index first",
        "rsa_megatron/alignment/nearest_neighbours.py",
        "return (nearness * DISTANCE_STEPS).round_().long() * 2**_INDEX_BITS - index",
        "return (nearness * DISTANCE_STEPS).round_().long() * 2**_INDEX_BITS + index",
        ("tests/unit/alignment/test_nearest_neighbours.py",),
    ),
    Mutation(
        "a data set that has ended begins from scratch",
        "rsa_megatron/data/single_epoch.py",
        "            yield from self.dataset\n        self._ended = True",
        "            yield from self.dataset\n        self._ended = False",
        ("tests/distributed/test_mixtures.py",),
    ),
)
