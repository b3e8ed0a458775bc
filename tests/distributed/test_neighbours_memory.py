"""Nearest neighbours are found without a matrix of all pairs in memory."""

import subprocess
import sys


def test_memory_is_nowhere_near_a_matrix_of_all_pairs():
    code = """if 1:
        import pathlib, torch
        from rsa_megatron.alignment.nearest_neighbours import nearest_neighbours
        def held(which):
            status = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024
        torch.set_num_threads(1)
        nearest_neighbours(torch.randn(3000, 16), 10)
        x_ND = torch.randn(16000, 16)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        nearest_neighbours(x_ND, 10)
        print(held("VmHWM") - before)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The candidates are 16000 x 32 x 12 bytes = 6 MB, blocks and what is sorted of them some 60; all pairs were 1024.
    assert float(result.stdout) < 200
