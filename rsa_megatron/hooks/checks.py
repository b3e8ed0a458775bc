"""Checks of a model's settings and of a batch for what RSA's hooks cannot follow; each error names a remedy.

megatron-core 0.16 to 0.20 name some settings differently, or not at all: one that a version does not have is off.
"""

from torch import Tensor

from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks.host import Host

_SAME_DATA = (
    "image and caption would be paired wrongly. Both stages must read the same data in the same order; a sample that only one of "
    "them could load, or a data folder that differs between nodes, breaks it."
)


def check_model(host: Host, config: RSAConfig) -> None:
    """Raise ValueError, naming setting and remedy, for a model whose training RSA would not get right."""
    settings = host.config
    refused = [
        *host.refusals(),
        (
            _of(settings, "mtp_num_layers"),
            "the last decoder layer's states are to be on the last stage: leave --mtp-num-layers out",
        ),
        (
            _of(settings, "overlap_moe_expert_parallel_comm"),
            "the loss is to follow its own forward pass: leave --overlap-moe-expert-parallel-comm out",
        ),
        (
            _has_full_iteration_graph(settings),
            "each micro-batch has other pairs: leave the full-iteration CUDA graph out",
        ),
        (
            _of(settings, "hybrid_context_parallel"),
            "the ranks of a sequence are to stay: leave --hybrid-context-parallel out",
        ),
        (
            config.scope == "global-batch" and config.normalize != "none",
            f"--rsa-normalize {config.normalize} needs the mean distance of a global batch before its last micro-batch: leave it, or "
            "--rsa-scope global-batch, out",
        ),
    ]
    if any(pair.vision != -1 or pair.text not in (-1, settings.num_layers) for pair in config.layer_pairs):
        recomputes = [_of(of, "recompute_granularity") == "full" for of in (settings, host.vision_config)]
        graphs = _of(settings, "cuda_graph_impl")
        refused += [
            (
                any(recomputes),
                "--rsa-layers reads each layer once: with layers before the last set --recompute-granularity selective",
            ),
            (
                graphs not in (None, "none"),
                "--rsa-layers reads layers before the last by hooks, which CUDA graphs leave out: "
                "set --cuda-graph-impl none",
            ),
        ]
    for is_on, reason in refused:
        if is_on:
            raise ValueError(f"RSA cannot train this model with these settings: {reason}")


def check_packing(is_packed: bool, *, reads_captions_alone: bool, captions_are_copies: bool) -> None:
    """Raise ValueError for packed rows where RSA cannot read them.

    Args:
        reads_captions_alone: --rsa-text-source caption.
        captions_are_copies: as RSASamples has it.
    """
    if is_packed and reads_captions_alone and not captions_are_copies:
        raise ValueError(
            "--rsa-text-source caption with packed sequences: each caption is to stand once more in the row, as a sequence of its "
            "own (RSASamples.captions_are_copies); leave one out"
        )
    if captions_are_copies and not (is_packed and reads_captions_alone):
        raise ValueError(
            "RSASamples.captions_are_copies is for --rsa-text-source caption with packed sequences (packed_seq_params): "
            + ("set it" if is_packed else "the copies would see their rows")
        )


def check_bounds_are_known(host: Host, arguments: dict, num_packed: int) -> None:
    """Raise ValueError on a stage whose attention would run on from one packed sample to the next.

    Args:
        num_packed: samples that are packed into the row, as the stage before says.
    """
    if num_packed and not host.knows_bounds(arguments):
        raise ValueError(
            f"a pipeline stage is not told where the {num_packed} sequences of its packed row begin, and would attend from one to "
            "another: pass packed_seq_params to the model's forward on every stage (docs/plugin.md)"
        )


def check_same_number(first_stage_packed: int, last_stage_packed: int) -> None:
    """Raise RuntimeError where the two ends of a pipeline have read rows of other numbers of samples; 0: rows of one sample."""
    if first_stage_packed != last_stage_packed:
        found = [f"a packed row of {n}" if n else "rows of one" for n in (first_stage_packed, last_stage_packed)]
        raise RuntimeError(
            f"the first and the last pipeline stage read different samples ({' against '.join(found)}): {_SAME_DATA}"
        )


def check_tiles(count_n: Tensor, num_tiles: int) -> bool:
    """Return whether there were any; ValueError where the samples' tiles are not those that the tower has been given."""
    expected = int(count_n.sum())
    if expected not in (0, num_tiles):  # 0: text alone, and a dummy image
        raise ValueError(
            f"the tower was given {num_tiles} tiles, and the batch's samples have {expected}: num_image_tiles, "
            "or what RSAPlugin(select=...) gives, does not go with the images"
        )
    return expected > 0


def check_same_samples(first_stage_ids: Tensor, last_stage_ids: Tensor) -> None:
    """Raise RuntimeError where the two ends of a pipeline have read different data."""
    differ = (first_stage_ids != last_stage_ids).nonzero().flatten().tolist()
    if differ:
        pairs = ", ".join(f"{first_stage_ids[b]:#018x} against {last_stage_ids[b]:#018x}" for b in differ)
        raise RuntimeError(f"the first and the last pipeline stage read different samples (ids {pairs}): {_SAME_DATA}")


def _of(settings, name: str):
    return getattr(settings, name, None)


def _has_full_iteration_graph(settings) -> bool:
    scope = _of(settings, "cuda_graph_scope") or ()
    scopes = [scope] if isinstance(scope, str) else list(scope) if isinstance(scope, (list, tuple)) else [scope]
    names = [*(getattr(one, "name", one) for one in scopes), _of(settings, "cuda_graph_impl")]
    return "full_iteration" in map(str, names)
