"""RSA in a Megatron training script: three wraps, and no other change to it.

    rsa = RSAPlugin(RSAConfig())
    ... extra_args_provider=rsa.add_arguments              the --rsa-* flags
    ... model_provider=rsa.wrap_model_provider(provider)   hooks on the model; no parameters, same checkpoints
    ... rsa.wrap_forward_step(forward_step)                the RSA term in the loss, its figures in the log

In Megatron-Bridge `provider.register_pre_wrap_hook(rsa.attach)` takes the place of the second.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.utils import get_model_config

from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.hooks.checks import check_model
from rsa_megatron.hooks.global_batch import GlobalBatch
from rsa_megatron.hooks.host import find_host
from rsa_megatron.hooks.objective import add_to_loss, rsa_term
from rsa_megatron.hooks.pair_watch import PairWatch
from rsa_megatron.hooks.representations import RepresentationHooks
from rsa_megatron.hooks.sample_selection import Selection


class RSAPlugin:
    """Adds the RSA loss to the training of a megatron.core LLaVAModel.

    Args:
        config: the settings; flags of the command line override them.
        select: which samples take part, and which tokens are their captions, from a batch as the data iterator gives it:
            (caption_mask [B, S], eligible [n]), integers, of which either may be None for the default; or RSASamples.
            By default what the batch itself has: an RSASamples as its attribute `rsa`, or `rsa_caption_mask` and
            `rsa_eligible` (RSATaskEncoder's) as keys or attributes. Of what it does not have: every sample with one image
            takes part, and its caption is the tokens that the LM loss trains on.
        log_interval: iterations in a row without anything to compare after which a warning is printed; the job's --log-interval.
    """

    def __init__(
        self,
        config: RSAConfig = RSAConfig(),
        select: Callable[[object], "RSASamples | tuple[torch.Tensor | None, torch.Tensor | None]"] | None = None,
        log_interval: int = 100,
    ):
        self.config = config
        self.log_interval = log_interval
        self._select = select or _of_batch
        #: shows a warning, on one rank
        self.say: Callable[[str], None] = functools.partial(print, flush=True)

    def __deepcopy__(self, memo) -> "RSAPlugin":
        # Megatron-Bridge copies model providers, with the hooks that were registered: all of them mean this plugin.
        return self

    def add_arguments(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the --rsa-* flags, one a field of RSAConfig; a flag that is given changes this plugin's config.

        (Megatron parses inside or outside of pretrain() depending on its version; the flags act in both.)
        """
        # argparse takes what begins with a dash for a flag unless it is a number: --rsa-layers -1:-1 is one, too.
        parser._negative_number_matcher = re.compile(parser._negative_number_matcher.pattern + r"|^-\d+:")
        group = parser.add_argument_group("representational space alignment")
        for setting in dataclasses.fields(RSAConfig):
            group.add_argument(
                "--rsa-" + setting.name.replace("_", "-"),
                type=setting.type,
                choices=setting.metadata.get("choices"),
                default=getattr(self.config, setting.name),
                help=setting.metadata["help"] + " (default: %(default)s)",
                action=_changes(self, setting.name),
            )
        return parser

    def attach(self, model: torch.nn.Module | list[torch.nn.Module]) -> torch.nn.Module | list[torch.nn.Module]:
        """Put the hooks on a model chunk, or on each of a list of chunks, and return it; with weight 0, none.

        A chunk is a LLaVAModel, or a module that has one within. Every rank of a pipeline must do it to each of its chunks,
        as model providers do: a stage without hooks would take the payload rows for tokens.
        """
        for chunk in model if isinstance(model, list) else [model]:
            if self.config.weight > 0:
                self._attach_to_chunk(chunk)
        return model

    def wrap_model_provider(self, model_provider: Callable) -> Callable:
        """Return the same provider, its model with the hooks attached."""

        @functools.wraps(model_provider)
        def provide(*args, **kwargs):
            return self.attach(model_provider(*args, **kwargs))

        return provide

    def wrap_forward_step(self, forward_step: Callable) -> Callable:
        """The same forward step, its loss function's result with the RSA term and its figures added.

        Args:
            forward_step: (data_iterator, model, ...), as Megatron-LM's schedules call it, or (state, data_iterator, model, ...),
                as Megatron-Bridge's do.
        """

        @functools.wraps(forward_step, updated=())
        def step(*args, **kwargs):
            if self.config.weight == 0:
                return forward_step(*args, **kwargs)
            if kwargs.get("return_schedule_plan"):
                raise ValueError(
                    "RSA cannot train with combined forward and backward passes (1F1B that overlaps expert-parallel "
                    "communication): leave --overlap-moe-expert-parallel-comm out"
                )
            # The schedules pass both by their places, next to each other.
            place = next((i for i, argument in enumerate(args) if isinstance(argument, torch.nn.Module)), 0)
            if not place:
                raise ValueError(
                    "RSA's forward step is to be called as Megatron's schedules do: (..., data_iterator, model)"
                )
            before, data_iterator, model, after = args[: place - 1], args[place - 1], args[place], args[place + 1 :]
            chunk = chunk_within(model)
            reader = None if data_iterator is None else _Reader(data_iterator, self._select)
            # A rank that holds an iterator need not read from it: those of a tensor-parallel group receive.
            chunk.rsa_hooks.start_micro_batch(
                lambda: None if reader is None or reader.selection is None else _as_selection(reader.selection)
            )
            try:
                output, loss_func = forward_step(*before, reader, model, *after, **kwargs)
            finally:
                representations = chunk.rsa_hooks.pop()
            if representations is None:
                return output, loss_func
            return output, functools.partial(self._loss, loss_func, representations, chunk, get_model_config(model))

        return step

    def _loss(self, loss_func, representations, chunk, model_config, output_tensor, **kwargs):
        outputs = loss_func(output_tensor, **kwargs)
        if kwargs.get("non_loss_data"):
            return outputs
        global_batch = None
        if self.config.scope == "global-batch":
            global_batch = chunk.rsa_global_batches[chunk.training]
            global_batch.begin_micro_batch()
            if chunk.training:
                chunk.rsa_global_batches[False].forget()
        groups = chunk.pg_collection
        term = rsa_term(representations, self.config, chunk.config, groups, global_batch)
        if chunk.training:
            warning = chunk.rsa_pair_watch.add(
                term.num_pairs, term.num_pairs + term.num_earlier_pairs, self.config.weight
            )
            if warning and not any(group.rank() for group in (groups.dp, groups.tp, groups.cp)):
                self.say(warning)
        return add_to_loss(outputs, term, self.config, model_config.calculate_per_token_loss, groups)

    def _attach_to_chunk(self, model: torch.nn.Module) -> None:
        host = find_host(model)
        chunk = host.model
        if hasattr(chunk, "rsa_hooks"):
            raise ValueError("RSAPlugin.attach: this model has its hooks already; attach it once")
        check_model(host, self.config)
        if chunk.config.pipeline_model_parallel_size > 1:
            # The hidden state with its payload rows is longer than the sequence: let the stages tell each other. (Set here
            # because TransformerConfig refuses it together with a default of its expert layers; and on both, as a module
            # around the host may have a config of its own, which is the one that the schedules ask.)
            chunk.config.variable_seq_lengths = get_model_config(model).variable_seq_lengths = True
        chunk.rsa_hooks = RepresentationHooks(host, self.config)
        chunk.rsa_pair_watch = PairWatch(self.log_interval)
        chunk.rsa_global_batches = {is_training: GlobalBatch() for is_training in (True, False)}


def chunk_within(model: torch.nn.Module) -> torch.nn.Module:
    """Return the host's module, with its hooks, in what Megatron has wrapped around it."""
    chunk = find_host(model).model
    if not hasattr(chunk, "rsa_hooks"):
        raise ValueError(
            "RSA's forward step is given a model without its hooks: wrap the model provider too "
            "(RSAPlugin.wrap_model_provider, or attach)"
        )
    return chunk


def _of_batch(batch) -> RSASamples | tuple[torch.Tensor | None, torch.Tensor | None]:
    read = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
    samples = read("rsa")
    return samples if isinstance(samples, RSASamples) else (read("rsa_caption_mask"), read("rsa_eligible"))


def _as_selection(selection) -> RSASamples | Selection:
    if isinstance(selection, RSASamples):
        return selection
    if not (isinstance(selection, tuple) and len(selection) == 2):
        raise ValueError(
            f"RSAPlugin(select=...) gave {type(selection).__name__}: give (caption_mask, eligible) or an RSASamples "
            "(rsa_megatron/batch.py)"
        )
    caption_mask, eligible = selection
    return Selection(eligible, caption_mask)


class _Reader:
    """A data iterator that remembers the selection of the batch it gave last, before the script changes that."""

    def __init__(self, data_iterator: Iterator, select: Callable):
        self._data_iterator, self._select = data_iterator, select
        self.selection = None

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._data_iterator)
        self.selection = self._select(batch)
        return batch

    def __getattr__(self, name: str):
        # copy and pickle ask an object that has no attributes yet, and for methods that the iterator would answer for itself
        if name.startswith("__") or "_data_iterator" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._data_iterator, name)


def _changes(plugin: RSAPlugin, name: str) -> type[argparse.Action]:
    class Change(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            try:
                plugin.config = dataclasses.replace(plugin.config, **{name: value})
            except ValueError as error:
                parser.error(str(error))
            setattr(namespace, self.dest, value)

    return Change
