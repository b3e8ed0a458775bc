"""A mixin by which an Energon job that exists already says which samples are eligible for RSA, and which tokens are the caption.

    class MyEncoder(RSATaskEncoder, TaskEncoder):  # the job's own TaskEncoder, as it is
        pass

A batch of many samples often keeps nothing of the single one: a job's `batch` may hand on the subflavors of its first
sample only, `encode_batch` may turn a dataclass into a dict and lose what is no field of it, and so does packing. So
nothing is hung onto the job's samples. Each travels through Energon inside a `_Tracked`, beside what RSA must know of it;
each method of the job is given what it was always given, and what it returns is wrapped again.

Energon looks at a task encoder's methods when it builds its data sets (`build_encode_sample`, `build_batch`): there it is
shown ours in their place, with the attributes of the job's own (@stateless, failure tolerance). Anywhere else the job's
methods are untouched: they may call one another, and `super()`, as before. Energon's key by which a sample is read again
passes through, and a sample that is read again is asked about again; so `rsa_eligible` and `rsa_caption_mask` must depend
on the sample alone.

Shapes: B sequences of a batch, S text positions, P samples of the whole batch (B, or more where sequences are packed).
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.energon import DefaultTaskEncoder, TaskEncoder
from megatron.energon.errors import FatalSampleError  # a ValueError that Energon does not pass over
from torch import Tensor

from rsa_megatron.data.rsa_flag import read_rsa_flag

ELIGIBLE, CAPTION_MASK = "rsa_eligible", "rsa_caption_mask"


class RSATaskEncoder:
    """Placed before a TaskEncoder, it adds to each batch:

    `rsa_eligible`, int64 [P]: 1 for an eligible sample, in the order in which they were batched and packed.
    `rsa_caption_mask`, int64 [B, S], where `rsa_caption_mask` is overridden: 1 where the token AT this position is the
    caption's.

    They are keys of a batch that is a mapping, otherwise attributes; a dataclass must have them as fields.

    Raises:
        ValueError: at the class's or a data set's construction: bases in the wrong order, a `batch`, `pack_selected_samples` or
            `encode_batch` that is a generator, or no batch size.
        FatalSampleError: at a batch; one line names the fault.
    """

    #: the token ids in a batch, [B, S], of which the caption mask takes its length; and in a sample, [its length]
    rsa_text_field = "tokens"

    def rsa_eligible(self, sample: Any) -> bool | Sequence[bool]:
        """Return whether a sample is eligible, as it comes from the data set, before it is encoded.

        By default what its subflavor `rsa` says, and True where there is none, as without this class every sample with one
        image is eligible. (The training script's own data is the other way round: without `rsa: true` a data set is not.) That it has exactly one image need not be
        looked at here. For a sample that holds several, packed beforehand, one answer for each of them.
        """
        subflavors = _get_field(sample, "__subflavors__")
        if subflavors is None:
            raise FatalSampleError(
                f"sample {_get_key(sample)} has no __subflavors__, where `rsa: true` or `rsa: false` would be: give its data set "
                f"`subflavors: {{rsa: ...}}` and hand them on where it is cooked (basic_sample_keys), or override rsa_eligible"
            )
        try:
            return read_rsa_flag(subflavors, default=True)
        except ValueError as error:
            raise FatalSampleError(f"sample {_get_key(sample)}: {error}") from error

    def rsa_caption_mask(self, encoded_sample: Any) -> Tensor | None:
        """Mark which tokens of an encoded sample are its caption, [its length]; not overridden, those of the loss mask are.

        Once overridden it answers for every sample; None is for one that is not eligible.
        """
        return None

    def rsa_packed_caption_mask(self, packed_sample: Any, masks: list[Tensor]) -> Tensor:
        """Join the masks of a packed sequence's samples, one after the other. Override it where packing pads them."""
        return torch.cat(masks)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if TaskEncoder in order and order.index(TaskEncoder) < order.index(RSATaskEncoder):
            raise ValueError(
                f"class {cls.__name__}: RSATaskEncoder must be the first of its bases, before the TaskEncoder"
            )

    def build_encode_sample(self, dataset, **settings):
        # The answer is wrapped from the first stage on, whether the job does anything there or not.
        first = "preencode_sample" if _is_overridden(self, "preencode_sample") else "encode_sample"
        with _expose_to_energon(self, [first]):
            return super().build_encode_sample(dataset, **settings)

    def build_batch(self, dataset, *, batch_size: int | None, **settings):
        if batch_size is None and not _is_overridden(self, "batch_group_criterion"):
            raise ValueError(
                f"batch_size is None: {ELIGIBLE} is added to batches; give a batch_size, 1 for sequences as they are"
            )
        optional = ["postencode_sample", "select_samples_to_pack", "pack_selected_samples", "batch_group_criterion"]
        stages = [name for name in optional if _is_overridden(self, name)] + ["batch", "encode_batch"]
        with _expose_to_energon(self, stages):
            return super().build_batch(dataset, batch_size=batch_size, **settings)


@dataclass
class _Tracked:
    """Something of the job's and what RSA must know of it; Energon sees it instead."""

    #: a sample, a packed sequence, or a batch not encoded yet
    inner: Any
    #: of each of its samples
    eligible: tuple[bool, ...]
    #: of each of its sequences, int64 [its length]; None for a sample that has not been asked
    masks: list[Tensor] | None = None

    @property
    def __restore_key__(self):
        if not isinstance(self.inner, Mapping):
            return self.inner.__restore_key__
        if "__restore_key__" not in self.inner:
            raise AttributeError("__restore_key__")  # what Energon asks with hasattr
        return self.inner["__restore_key__"]

    @__restore_key__.setter
    def __restore_key__(self, key):
        _set_field(self.inner, "__restore_key__", key)


# What Energon calls in place of the job's method, which comes as the second argument.


def _encode_sample(encoder: RSATaskEncoder, encode: Callable, sample) -> _Tracked:
    tracked = _track(encoder, sample)
    return replace(tracked, inner=encode(tracked.inner))


def _encode_sample_to_many(encoder: RSATaskEncoder, encode: Callable, sample) -> Iterator[_Tracked]:
    tracked = _track(encoder, sample)
    for encoded in encode(tracked.inner):
        yield replace(tracked, inner=encoded)


def _select_samples_to_pack(encoder: RSATaskEncoder, select: Callable, samples: list[_Tracked]) -> list[list[_Tracked]]:
    tracked = {id(sample.inner): sample for sample in samples}
    packs = [list(pack) for pack in select([sample.inner for sample in samples])]
    for sample in (sample for pack in packs for sample in pack):
        if id(sample) not in tracked:
            raise FatalSampleError(
                f"select_samples_to_pack returned sample {_get_key(sample)}, which it was not given: return the given ones; "
                f"change samples in pack_selected_samples"
            )
    return [[tracked[id(sample)] for sample in pack] for pack in packs]


def _pack_selected_samples(encoder: RSATaskEncoder, pack: Callable, samples: list[_Tracked]) -> _Tracked:
    row = _merge(encoder, samples)
    row.inner = pack(row.inner)
    if row.masks is not None:
        row.masks = [_check_mask(encoder, row.inner, encoder.rsa_packed_caption_mask(row.inner, row.masks))]
    return row


def _batch_group_criterion(encoder: RSATaskEncoder, criterion: Callable, sample: _Tracked):
    return criterion(sample.inner)


def _batch(encoder: RSATaskEncoder, batch: Callable, samples: list[_Tracked]) -> _Tracked:
    merged = _merge(encoder, samples)
    merged.inner = batch(merged.inner)
    return merged


def _encode_batch(encoder: RSATaskEncoder, encode: Callable, raw: _Tracked):
    batch = encode(raw.inner)
    _deliver(batch, ELIGIBLE, torch.tensor(raw.eligible, dtype=torch.int64))
    if raw.masks is not None:
        _deliver(batch, CAPTION_MASK, _fit_to_text(encoder, batch, raw.masks))
    return batch


_REPLACEMENTS = {
    "preencode_sample": _encode_sample,
    "encode_sample": _encode_sample,
    "postencode_sample": _encode_sample,
    "select_samples_to_pack": _select_samples_to_pack,
    "pack_selected_samples": _pack_selected_samples,
    "batch_group_criterion": _batch_group_criterion,
    "batch": _batch,
    "encode_batch": _encode_batch,
}


def _make_stage(encoder: RSATaskEncoder, name: str) -> Callable:
    method, function = getattr(encoder, name), _REPLACEMENTS[name]
    if inspect.isgeneratorfunction(method):
        if function is not _encode_sample:
            raise ValueError(
                f"{type(encoder).__name__}.{name} is a generator, whose samples RSATaskEncoder cannot track: "
                f"return one result, and raise SkipSample where there is none"
            )
        function = _encode_sample_to_many  # Energon asks whether it is a generator
    # With the method's name and attributes (__stateless__, __failure_tolerance__).
    return functools.update_wrapper(functools.partial(function, encoder, method), method)


def _is_overridden(encoder: RSATaskEncoder, name: str) -> bool:
    method = getattr(encoder, name, None)  # Energon 6 has no preencode_sample
    function = getattr(method, "__func__", method)
    return method is not None and not any(
        getattr(base, name, None) is function for base in (TaskEncoder, DefaultTaskEncoder)
    )


@contextlib.contextmanager
def _expose_to_energon(encoder: RSATaskEncoder, names: list[str]) -> Iterator[None]:
    """Set ours as attributes of the encoder, which go before its class's methods."""
    stages = {name: _make_stage(encoder, name) for name in names}
    attributes = vars(encoder)
    own = {name: attributes[name] for name in names if name in attributes}
    attributes.update(stages)
    try:
        yield
    finally:
        for name in names:
            del attributes[name]
        attributes.update(own)


def _track(encoder: RSATaskEncoder, sample) -> _Tracked:
    if isinstance(sample, _Tracked):  # of the stage before
        return sample
    answer = encoder.rsa_eligible(sample)
    answers = answer if isinstance(answer, (list, tuple)) else [answer]
    if not all(one in (True, False) for one in answers):
        raise FatalSampleError(
            f"rsa_eligible returned {answer!r} for sample {_get_key(sample)}; it must return True or False"
        )
    return _Tracked(sample, tuple(bool(one) for one in answers))


def _merge(encoder: RSATaskEncoder, samples: list[_Tracked]) -> _Tracked:
    """Merge the samples of a sequence or a batch as the job knows them, with what is known of them in their order."""
    eligible = tuple(one for sample in samples for one in sample.eligible)
    masks = None
    if type(encoder).rsa_caption_mask is not RSATaskEncoder.rsa_caption_mask:
        masks = [mask for sample in samples for mask in sample.masks or [_get_caption_mask(encoder, sample)]]
    return _Tracked([sample.inner for sample in samples], eligible, masks)


def _get_caption_mask(encoder: RSATaskEncoder, sample: _Tracked) -> Tensor:
    mask = encoder.rsa_caption_mask(sample.inner)
    if mask is None and any(sample.eligible):
        raise FatalSampleError(
            f"rsa_caption_mask returned None for sample {_get_key(sample.inner)}, which rsa_eligible selects: return its mask"
        )
    if mask is None:
        return torch.zeros(len(_get_text(encoder, sample.inner)), dtype=torch.int64)
    return _check_mask(encoder, sample.inner, mask)


def _check_mask(encoder: RSATaskEncoder, sample, mask) -> Tensor:
    # A sample's text may have another name than a batch's.
    mask, text = torch.as_tensor(mask), _get_field(sample, encoder.rsa_text_field)
    if mask.ndim != 1 or (text is not None and len(text) != len(mask)):
        raise FatalSampleError(
            f"the caption mask of sample {_get_key(sample)} has the shape {list(mask.shape)}, its {encoder.rsa_text_field} are "
            f"{'unknown' if text is None else len(text)}: rsa_caption_mask must have one number for each token, and "
            f"rsa_packed_caption_mask where packing pads"
        )
    return mask.ne(0).long()


def _fit_to_text(encoder: RSATaskEncoder, batch, masks: list[Tensor]) -> Tensor:
    """Stack the sequences' masks, [B, S]: padded with 0, and truncated where the job has truncated the text."""
    shape = tuple(_get_text(encoder, batch).shape)
    if len(shape) != 2 or shape[0] != len(masks):
        raise FatalSampleError(
            f"the batch's {encoder.rsa_text_field} have the shape {list(shape)} and were made of {len(masks)} samples: a "
            f"caption mask needs one sequence for each; to use the loss mask, do not override rsa_caption_mask"
        )
    padded = torch.zeros(shape, dtype=torch.int64)
    for row, mask in zip(padded, masks):
        row[: len(mask)] = mask[: len(row)]
    return padded


def _get_text(encoder: RSATaskEncoder, holder) -> Tensor:
    text = _get_field(holder, encoder.rsa_text_field)
    if text is None:
        raise FatalSampleError(
            f"a {type(holder).__name__} of {type(encoder).__name__} has no {encoder.rsa_text_field!r}, which sets the "
            f"caption mask's length: set rsa_text_field to the name of its token ids"
        )
    return text


def _deliver(batch, name: str, value: Tensor) -> None:
    # Pinning memory rebuilds a dataclass from its fields: an attribute that is not one would be lost there.
    if not dataclasses.is_dataclass(batch) or name in {field.name for field in dataclasses.fields(batch)}:
        with contextlib.suppress(AttributeError):  # of a tuple, or of slots
            return _set_field(batch, name, value)
    raise FatalSampleError(
        f"the batch, a {type(batch).__name__}, has no field {name}: add `{name}: torch.Tensor | None = None` to it, or let "
        f"encode_batch return a dict"
    )


def _get_key(sample) -> str:
    return _get_field(sample, "__key__", "without a __key__")


def _get_field(holder, name: str, default=None):
    """Return a key of a mapping, or an attribute."""
    return holder.get(name, default) if isinstance(holder, Mapping) else getattr(holder, name, default)


def _set_field(holder, name: str, value) -> None:
    if isinstance(holder, Mapping):
        holder[name] = value
    else:
        setattr(holder, name, value)
