"""RSA in a Megatron training script: three wraps, and no other change to it.

    rsa = RSAPlugin(RSAConfig())
    ... extra_args_provider=rsa.add_arguments              the --rsa-* flags
    ... model_provider=rsa.wrap_model_provider(provider)   hooks on the model; no parameters, same checkpoints
    ... rsa.wrap_forward_step(forward_step)                the RSA term in the loss, its figures in the log
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from rsa_megatron.batch import RSASamples
from rsa_megatron.config import RSAConfig
from rsa_megatron.llava.objective import add_to_loss, rsa_term
from rsa_megatron.llava.taps import Taps


class RSAPlugin:
    """Adds the RSA loss to LLaVAModel training.

    Args:
        config: the settings; flags of the command line override them.
        select: from a batch, as the data iterator gives it, to its RSASamples. By default its attribute `rsa`.
    """

    def __init__(self, config: RSAConfig = RSAConfig(), select: Callable[[object], RSASamples] | None = None):
        self.config = config
        self._select = select or _batch_rsa

    def add_arguments(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the --rsa-* flags, one a field of RSAConfig; a flag that is given changes this plugin's config.

        (Megatron parses inside or outside of pretrain() depending on its version; the flags act in both.)
        """
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

    def attach(self, model: LLaVAModel | list[LLaVAModel]) -> LLaVAModel | list[LLaVAModel]:
        """Put the taps on a model chunk, or on each of a list of chunks, and return it; with weight 0, nothing.

        Every rank of a pipeline must do it to each of its chunks, as model providers do: a stage without taps would
        take the carrier rows for tokens.
        """
        for chunk in model if isinstance(model, list) else [model]:
            if self.config.weight > 0:
                self._attach_to_chunk(chunk)
        return model

    def wrap_model_provider(self, model_provider: Callable) -> Callable:
        """The same provider, its model with the taps attached."""

        @functools.wraps(model_provider)
        def provide(*args, **kwargs):
            return self.attach(model_provider(*args, **kwargs))

        return provide

    def wrap_forward_step(self, forward_step: Callable) -> Callable:
        """The same forward step, its loss function's result with the RSA term and its figures added."""

        @functools.wraps(forward_step)
        def step(data_iterator, model, *args, **kwargs):
            if self.config.weight == 0:
                return forward_step(data_iterator, model, *args, **kwargs)
            chunk = _chunk_with_taps(model)
            reader = None if data_iterator is None else _Reader(data_iterator)
            # A rank that holds an iterator need not read from it: those of a tensor-parallel group receive.
            chunk.rsa_taps.begin(lambda: None if reader is None or reader.last is None else self._select(reader.last))
            output, loss_func = forward_step(reader, model, *args, **kwargs)
            representations = chunk.rsa_taps.take()
            if representations is None:
                return output, loss_func
            return output, functools.partial(self._loss, loss_func, representations, chunk)

        return step

    def _loss(self, loss_func, representations, chunk, output_tensor, **kwargs):
        outputs = loss_func(output_tensor, **kwargs)
        if kwargs.get("non_loss_data"):
            return outputs
        model_config, groups = get_model_config(chunk), chunk.pg_collection
        term = rsa_term(representations, self.config, model_config, groups)
        return add_to_loss(outputs, term, self.config, model_config.calculate_per_token_loss, groups)

    def _attach_to_chunk(self, chunk: LLaVAModel) -> None:
        if hasattr(chunk, "rsa_taps"):
            raise ValueError("RSAPlugin.attach: this model has its taps already; attach it once")
        if chunk.config.mtp_num_layers:
            raise ValueError("RSA needs the last decoder layer's states on the last stage: set --mtp-num-layers 0")
        if chunk.config.pipeline_model_parallel_size > 1:
            # The hidden state with its carrier rows is longer than the sequence: let the stages tell each other.
            # (Set here because TransformerConfig refuses it together with a default of its expert layers.)
            chunk.config.variable_seq_lengths = True
        chunk.rsa_taps = Taps(chunk, self.config)


def _chunk_with_taps(model) -> LLaVAModel:
    try:
        return get_attr_wrapped_model(model, "rsa_taps", return_model_obj=True)
    except RuntimeError as error:
        raise ValueError(
            "RSA's forward step is given a model without its taps: wrap the model provider too "
            "(RSAPlugin.wrap_model_provider, or attach)"
        ) from error


def _batch_rsa(batch) -> RSASamples:
    if not hasattr(batch, "rsa"):
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no attribute rsa: give it an RSASamples (rsa_megatron/batch.py), or "
            "tell the plugin where they are: RSAPlugin(config, select=...)"
        )
    return batch.rsa


class _Reader:
    """A data iterator that remembers the batch it gave last."""

    def __init__(self, data_iterator: Iterator):
        self._data_iterator = data_iterator
        self.last = None

    def __iter__(self):
        return self

    def __next__(self):
        self.last = next(self._data_iterator)
        return self.last


def _changes(plugin: RSAPlugin, name: str) -> type[argparse.Action]:
    class Change(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            try:
                plugin.config = dataclasses.replace(plugin.config, **{name: value})
            except ValueError as error:
                parser.error(str(error))
            setattr(namespace, self.dest, value)

    return Change
