"""Megatron on the CPU: on when there is no CUDA, without effect when there is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import processes, tiny_dual_encoders, tiny_hf


def in_a_fresh_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_nothing_is_replaced_where_there_is_cuda():
    code = """
import torch
torch.cuda.is_available = lambda: True  # as on a machine with a GPU
def state():
    owners = {"torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module, "optim": torch.optim.Optimizer}
    return {(name, key): id(value) for name, owner in owners.items() for key, value in vars(owner).items()}
before = state()
from rsa_megatron import megatron_on_cpu
assert megatron_on_cpu.enable() is False
after = state()
print([key for key in before if before[key] != after.get(key)])
"""
    assert in_a_fresh_process(code).strip() == "[]"


def test_it_says_so_once_and_can_be_called_again():
    code = "from rsa_megatron import megatron_on_cpu; print(megatron_on_cpu.enable(), megatron_on_cpu.enable())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True True"
    assert result.stderr.count("no CUDA device: Megatron runs on the CPU") == 1


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path):
    code = """
import os, sys, torch
from pathlib import Path
from rsa_megatron import megatron_on_cpu
megatron_on_cpu._NVIDIA_DEVICE = Path(sys.executable)  # there is one
try:
    megatron_on_cpu.enable()
except RuntimeError as error:
    print(error)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on purpose
print(megatron_on_cpu.enable())
"""
    refused, enabled = in_a_fresh_process(code).splitlines()
    assert "that torch cannot use" in refused and "CUDA_VISIBLE_DEVICES= (empty)" in refused
    assert enabled == "True"


def what_megatron_would_do_with_cuda():
    tensor = torch.zeros(3, device="cuda")
    module = torch.nn.Linear(2, 2).cuda().to("cuda:0")
    state = torch.cuda.get_rng_state()
    first = torch.rand(2, device=torch.cuda.current_device())
    torch.cuda.set_rng_state(state)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    return (
        [
            str(x.device)
            for x in (tensor, torch.ones(2).cuda(), torch.arange(3).to("cuda"), module.weight, tensor.new_zeros(1))
        ],
        tensor.type() == "torch.cuda.FloatTensor" and isinstance(torch.ones(1).type(torch.int64), torch.Tensor),
        torch.equal(first, torch.rand(2, device="cuda")),
        torch.ones(2).to(torch.float16).dtype == torch.float16,
        torch.compile(lambda x: x + 1)(1) == 2 and torch.compile(mode="max-autotune")(lambda x: x + 1)(1) == 2,
    )


def test_what_asks_for_cuda_gets_the_cpu():
    (result,) = processes.run(what_megatron_would_do_with_cuda, 1)
    assert result == (["cpu"] * 5, True, True, True, True)


def writes_to_what_was_moved():
    """Where numbers stand after a write to a moved tensor: of an expanded one, in the source and in the result."""
    moves = {
        "cuda()": lambda x: x.cuda(),
        "cuda(non_blocking)": lambda x: x.cuda(non_blocking=True),
        "to(cuda)": lambda x: x.to("cuda"),
        "to(device=0)": lambda x: x.to(device=0, non_blocking=True),
        "pin_memory()": lambda x: x.pin_memory(),
    }
    found = {}
    for name, move in moves.items():
        source = torch.zeros(3)
        moved = move(source.expand(2, 3))
        moved[0, 1] = 1.0
        found[name] = source.tolist(), moved.tolist(), moved.is_contiguous()
    parameter, dense = torch.nn.Parameter(torch.zeros(2)), torch.zeros(3)
    gradient_of = torch.zeros(3, requires_grad=True)
    gradient_of.expand(2, 3).cuda().sum().backward()
    # What a GPU gives back as it is when it is there already: a parameter stays the module's.
    stay = [parameter.cuda() is parameter, dense.to("cuda") is dense, dense.expand(2, 3).to("cpu").stride() == (0, 1)]
    return found, stay, gradient_of.grad.tolist()


def test_a_copy_of_an_expanded_tensor_can_be_written_to():
    ((found, stay, gradient),) = processes.run(writes_to_what_was_moved, 1)
    assert len(found) == 5
    for name, result in found.items():
        assert result == ([0.0] * 3, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], True), name
    assert stay == [True] * 3 and gradient == [2.0] * 3
    with pytest.raises(RuntimeError, match="single memory location"):  # what x itself would do
        torch.zeros(3).expand(2, 3).add_(1.0)


def parameters_and_buffers(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("kind", ["clip", "siglip", "llava_onevision"])
def test_transformers_loads_whole_models_beside_it(demo, tmp_path, kind):
    """Their buffers are not in the files: from_pretrained computes them, after it has built the model on the meta device."""
    if kind == "llava_onevision":
        folder = tiny_hf.write(tmp_path / kind, demo / "tokenizer", tied=True)
    else:
        folder = getattr(tiny_dual_encoders, kind)(tmp_path / kind)
    expected = parameters_and_buffers(folder)
    (actual,) = processes.run(parameters_and_buffers, 1, folder)
    assert actual.keys() == expected.keys() and any("position_ids" in name for name in expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
