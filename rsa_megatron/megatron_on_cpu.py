"""Megatron without CUDA: the same code on the CPU, over gloo, for debugging, tests and the demo.

`enable()` does nothing where a CUDA device is present. Where there is none it stands in, from outside and in
this process only, for what Megatron takes from CUDA; nothing on disk is touched. Nothing else in the package
replaces anything (rsa_megatron/training/megatron_patches.py does, for the training script).

    what Megatron does                                    what stands in
    --------------------------------------------------    ------------------------------------------------------
    torch.cuda.is_available(), device_count(),            True, the local world size, the CPU, fixed values
      current_device(), properties and capability
    streams, events, synchronize, nvtx, memory figures    objects and functions that do nothing
    x.cuda(), module.cuda(), x.pin_memory(), x.to("cuda") x itself
    torch.zeros(..., device="cuda") and its like          the same on the CPU
    type names: grad.type() == "torch.cuda.FloatTensor"   Tensor.type() reports the cuda name
    the CUDA generator's state                            the CPU generator's: dropout draws from it, and must find it
                                                            the same on all tensor-parallel ranks, so that what one of
                                                            them does alone must leave it as it was, as our loaders do
                                                            (rsa_megatron/data/random_generators.py)
    torch.compile of fused helpers                        the functions themselves
    Transformer Engine's check in LLaVAModel and torch    Megatron's own attention passes the check (sequence
      norms' refusal of sequence parallelism                parallelism is plain collectives); norms that mark their
                                                            parameters, whose gradients Megatron then sums over TP
    CLIPViTModel's own norms without Transformer Engine   the same norms, which take Megatron's arguments

Context parallelism is not among them: it needs Transformer Engine's attention.
Call it before megatron is imported; `MEGATRON_ARGUMENTS` are the settings that the CPU path needs.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._device import _device_constructors

logger = logging.getLogger(__name__)

#: Megatron arguments, by their names in the parsed namespace, that the CPU needs beside those of local layers.
MEGATRON_ARGUMENTS = dict(distributed_backend="gloo", use_cpu_initialization=True)

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange empty empty_like eye full full_like linspace ones ones_like rand rand_like randint randn randn_like "
    "randperm tensor zeros zeros_like as_tensor empty_strided"
).split()
_NVIDIA_DEVICE = Path("/dev/nvidia0")
_enabled = False


def enable() -> bool:
    """Make Megatron run on the CPU of this process if there is no CUDA device.

    Returns:
        True if Megatron now runs on the CPU; False if there is a CUDA device and nothing was changed.

    Raises:
        RuntimeError: there is an NVIDIA device that torch cannot use, and CUDA_VISIBLE_DEVICES does not hide it: one
            node of a cluster with a broken driver must not go on alone on its CPU.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False
    if _NVIDIA_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise RuntimeError(
            f"{platform.node()} has an NVIDIA device ({_NVIDIA_DEVICE}) that torch cannot use: see `nvidia-smi` and whether "
            f"torch {torch.__version__} is built for its driver. To run on the CPU all the same: CUDA_VISIBLE_DEVICES= (empty)"
        )
    # Tensor parallelism asserts it, to order communication after computation on a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _stand_in_for_torch_cuda()
    _stand_in_for_placement()
    _stand_in_for_compilation()
    _stand_in_inside_megatron()
    _enabled = True
    if int(os.environ.get("RANK", "0")) == 0 and multiprocessing.parent_process() is None:
        logger.warning("no CUDA device: Megatron runs on the CPU (rsa_megatron.megatron_on_cpu)")
    return True


class _NoStream:
    """A CUDA stream or event with nothing behind it: every method returns at once."""

    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def elapsed_time(self, other) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def _nothing(self, *args, **kwargs):
        return None

    wait = record = synchronize = wait_stream = wait_event = record_event = _nothing


def _stand_in_for_torch_cuda():
    no_stream = _NoStream()
    values = {
        "is_available": True,
        "is_initialized": True,
        "current_device": _CPU,
        "current_stream": no_stream,
        "default_stream": no_stream,
        "get_device_capability": (8, 0),
        "get_device_name": "cpu",
        "get_device_properties": SimpleNamespace(name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=0),
        "memory_stats": {
            "reserved_bytes.all.current": 0,
            "allocated_bytes.all.current": 0,
            "allocated_bytes.all.peak": 0,
            "allocation.all.current": 0,
        },
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "device_memory_used": 0,
        "is_current_stream_capturing": False,
    }
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for name in (
        "set_device",
        "set_stream",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
        "_lazy_init",
        "check_error",
    ):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.ExternalStream = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.nvtx = SimpleNamespace(range_push=lambda *a: None, range_pop=lambda *a: None, mark=lambda *a: None)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # A function of its own: torch 2.11's dynamo, which transformers loads, refuses one function under two names.
    torch.cuda.manual_seed = torch.cuda.random.manual_seed = lambda seed: torch.manual_seed(seed)
    # Data loaders ask here whether there is anything to pin memory for.
    torch.accelerator.is_available = lambda: False


def _on_cuda(device) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _stand_in_for_placement():
    def on_cpu(factory):
        @functools.wraps(factory)
        def build(*args, **kwargs):
            if "device" in kwargs and _on_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return build

    # `with torch.device(...)` knows factories by a set that is made at its first use: of the functions themselves, which
    # ours call, and not of ours. Else it would have no effect from here on, and transformers' from_pretrained, which builds
    # models on the meta device, would leave buffers as the memory happened to be.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self
        owner.to = _to_with_cuda_as_cpu(owner.to)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor_type = torch.Tensor.type
    torch.Tensor.type = lambda self, dtype=None, *args, **kwargs: (
        tensor_type(self).replace("torch.", "torch.cuda.")
        if dtype is None
        else tensor_type(self, dtype, *args, **kwargs)
    )
    for name in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Byte"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _to_with_cuda_as_cpu(to):
    @functools.wraps(to)
    def move(self, *args, **kwargs):
        if args and (isinstance(args[0], (str, torch.device)) or type(args[0]) is int) and _on_cuda(args[0]):
            args = (_CPU, *args[1:])
        if kwargs.get("device") is not None and _on_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    return move


def _stand_in_for_compilation():
    # Fused helpers are decorated when megatron is imported. Without a GPU compiling them costs seconds and wins nothing.
    torch.compile = lambda model=None, *args, **kwargs: (lambda fn: fn) if model is None else model
    # The optimizer asks the accelerator whether a graph is being captured.
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
    torch.optim.Optimizer._cuda_graph_capture_health_check = lambda self: None


class _KindOf:
    """Equal to a class and to all its subclasses: LLaVAModel asks with == which attention its decoder has."""

    def __init__(self, kind: type):
        self._kind = kind

    def __eq__(self, other) -> bool:
        return isinstance(other, type) and issubclass(other, self._kind)


def _stand_in_inside_megatron():
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # A warning at each dropout of a tensor-parallel region, where draws from the CPU's generator are what is wanted.
    logging.getLogger(tensor_parallel_random.__name__).addFilter(
        lambda record: record.msg != "CPU RNG state changed within GPU RNG context"
    )
    if not llava_model.HAVE_TE:
        llava_model.TEDotProductAttention, llava_model.HAVE_TE = _KindOf(DotProductAttention), True
        torch_norm.WrappedTorchNorm.__new__ = staticmethod(_norm_for_sequence_parallelism)
        # The tower's own norms would be torch.nn.LayerNorm itself, which does not take Megatron's arguments.
        CLIPViTModel.__init__.__defaults__ = tuple(
            torch_norm.WrappedTorchNorm if default is torch.nn.LayerNorm else default
            for default in CLIPViTModel.__init__.__defaults__
        )


def _norm_for_sequence_parallelism(cls, config, hidden_size, eps=1e-5, *args, **kwargs):
    norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        # finalize_model_grads adds up the gradients of marked parameters over the ranks that share the sequence.
        parameter.sequence_parallel = config.sequence_parallel
    return norm
