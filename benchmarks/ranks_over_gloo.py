"""The RSA term in processes that form groups of 1, 2 and 4 ranks over gloo: what each rank does, counts and times.

Processes of one thread, as many as the largest group; smaller groups are its first ranks. They take turns by a barrier in
shared memory, so that nothing but the gather goes through the network, and those whose turn it is not sleep.

Shapes: N rows in all, n a rank's own; D and E widths.
"""

import ctypes
import json
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from rsa_megatron.alignment.gather import gather_rows
from rsa_megatron.alignment.loss import rsa_loss_of_rows

_GEMM_SIZE = 2048
_GATHERED_FLOATS = 4 * 2**20  # 16 MB a rank
_CPU = torch.device("cpu")
_TIMEOUT_S = 600


def measure(sizes: list[int], widths: tuple[int, int], group_sizes: tuple[int, ...], num_runs: int) -> list[dict]:
    """What each process has measured, by rank; keys as JSON has them, numbers as text."""
    turns = torch.multiprocessing.get_context("fork").Barrier(max(group_sizes), timeout=_TIMEOUT_S)
    with tempfile.TemporaryDirectory() as folder:
        arguments = folder, turns, sizes, widths, group_sizes, num_runs
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=max(group_sizes), start_method="fork")
        return [json.loads(Path(folder, f"rank-{rank}").read_text()) for rank in range(max(group_sizes))]


def _rank(rank, folder, turns, sizes, widths, group_sizes, num_runs):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=max(group_sizes)
    )
    groups = {size: torch.distributed.new_group(range(size)) for size in group_sizes}
    measured = {num_pairs: _of_size(num_pairs, widths, rank, groups, turns, num_runs) for num_pairs in sizes}
    network = _network(groups[2], num_runs) if rank < 2 else None
    Path(folder, f"rank-{rank}").write_text(json.dumps(dict(measured=measured, network=network)))
    turns.wait()


def _of_size(num_pairs, widths, rank, groups, turns, num_runs) -> dict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(num_pairs, width, generator=generator) for width in widths]
    own = {size: _own_rows(rows, rank, num_pairs // size) for size in groups if rank < size}
    times, rates = {size: [] for size in own}, []
    for _ in range(num_runs + 1):  # the first of each warms up
        for size, group in groups.items():
            turns.wait()
            if size in own:
                times[size].append(_seconds(own[size], group))
        turns.wait()
        if rank == 0:
            rates.append(_rates(rows))
    figures = {
        size: dict(zip(("work_s", "wall_s"), _medians(runs[1:])), runs_s=runs[1:]) for size, runs in times.items()
    }
    for size, group in groups.items():
        counts = _count(own.get(size), group, turns)
        if size in own:
            figures[size] |= counts | dict(gradient_error=_gradient_error(own, size), memory=_memory(own[size], group))
    return dict(groups=figures, flops_memory=_medians(rates[1:]) if rates else None)


def _own_rows(rows: list[Tensor], rank: int, num_own: int) -> list[Tensor]:
    return [x[rank * num_own : (rank + 1) * num_own].clone().requires_grad_() for x in rows]


def _term(own: list[Tensor], group) -> Tensor:
    """As hooks/objective.py has it: one gather for both spaces."""
    v_nD, t_nE = own
    rows_nW = torch.cat(own, dim=1)
    gathered_NW, first_row = gather_rows(rows_nW, torch.ones(len(rows_nW), dtype=torch.bool), group)
    v_ND, t_NE = gathered_NW.split([v_nD.shape[1], t_nE.shape[1]], dim=1)
    return rsa_loss_of_rows(v_nD, t_nE, v_ND, t_NE, first_row).loss


def _backward(own, group):
    _forget_gradients(own)
    _term(own, group).backward()


def _forget_gradients(own):
    for x in own:
        x.grad = None


def _seconds(own, group) -> tuple[float, float]:
    """CPU time of this thread, which gloo's own do not add to, and wall time."""
    start = time.perf_counter()
    work = _cpu_seconds(lambda: _backward(own, group))
    return work, time.perf_counter() - start


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def _rates(rows) -> tuple[float, float]:
    """Floating-point operations a second of a product, bytes a second of copying rows into memory that is not there yet."""
    a, b, product = torch.randn(3, _GEMM_SIZE, _GEMM_SIZE)
    flops = 2 * _GEMM_SIZE**3 / _cpu_seconds(lambda: torch.mm(a, b, out=product))
    return flops, 2 * rows[1].nbytes / _cpu_seconds(rows[1].clone)


def _medians(runs) -> list[float]:
    return [statistics.median(run) for run in zip(*runs)]


def _network(group, num_runs) -> list[float]:
    """gloo's bytes a second and seconds for a hop, between two processes."""
    return _medians([_gather_rates(group) for _ in range(num_runs + 1)][1:])


def _gather_rates(group) -> tuple[float, float]:
    seconds = []
    for num_floats in (1, _GATHERED_FLOATS):
        part, gathered = torch.ones(num_floats), torch.ones(group.size() * num_floats)
        start = time.perf_counter()
        torch.distributed.all_gather_into_tensor(gathered, part, group=group)
        seconds.append(time.perf_counter() - start)
    return part.nbytes / (seconds[1] - seconds[0]), seconds[0]


def _count(own: list[Tensor] | None, group, turns) -> dict:
    """Collectives, and bytes on the wire, of either pass. A process outside of the group waits with the others."""
    _forget_gradients(own or [])
    before = _settled_wire_bytes(turns)
    with CommDebugMode() as forward:
        loss = _term(own, group) if own else torch.zeros((), requires_grad=True)
    between = _settled_wire_bytes(turns)
    with CommDebugMode() as backward:
        loss.backward()
    after = _settled_wire_bytes(turns)
    return dict(
        loss=loss.item(),
        forward=[b - a for a, b in zip(before, between)],
        backward=[b - a for a, b in zip(between, after)],
        forward_collectives=_names(forward),
        backward_collectives=_names(backward),
    )


def _names(counted: CommDebugMode) -> list[str]:
    return [str(name) for name, count in counted.get_comm_counts().items() for _ in range(count)]


def _settled_wire_bytes(turns) -> tuple[int, int]:
    """Once all processes are there, and what they have sent has arrived: gloo's last notices are sent by its own threads."""
    turns.wait()
    last, counted = None, _wire_bytes()
    while counted != last:
        time.sleep(0.05)
        last, counted = counted, _wire_bytes()
    turns.wait()
    return counted


def _wire_bytes() -> tuple[int, int]:
    """Bytes that this process's TCP connections have sent (and seen acknowledged) and received, as Linux counts them."""
    sent = received = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and os.readlink(link).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    # struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received are its bytes 120 to 135.
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                    counts = struct.unpack_from("=QQ", info, 120)
                    sent, received = sent + counts[0], received + counts[1]
    return sent, received


def _gradient_error(own: dict, size: int) -> float | None:
    """Of the first rank's own rows: how far their gradient is from the one that a single process gives them."""
    if 1 not in own:
        return None
    pairs = [(x.grad, whole.grad[: len(x)]) for x, whole in zip(own[size], own[1])]
    return max(((actual - expected).norm() / expected.norm()).item() for actual, expected in pairs)


def _memory(own, group) -> int:
    _forget_gradients(own)
    # What earlier runs have freed, malloc may hold and give out again: no growth would be seen.
    ctypes.CDLL(None).malloc_trim(0)
    return machine.growth_at_peak(lambda: _backward(own, group), _CPU)
