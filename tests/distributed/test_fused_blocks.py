"""With fused blocks rsa_loss is eq. 5 to the rounding of their precision, whatever the rows; so is each block.

No GPU is needed: Triton's interpreter runs the same programs on the CPU. It must be asked for before Triton is imported, so
one process of its own runs them all. What the interpreter cannot see, whether they compile and fit, is tested by compiling.
"""

import importlib.util
import multiprocessing
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from rsa_megatron.alignment import fused_blocks
from rsa_megatron.alignment import loss as loss_module
from rsa_megatron.alignment.distances import DISTANCES, pairwise_distance, unit_rows
from rsa_megatron.alignment.fused_blocks import PRECISIONS, FusedBlocks, rounded_rows
from rsa_megatron.alignment.loss import NORMALIZATIONS, rsa_loss, rsa_loss_of_rows, rsa_loss_reference
from rsa_megatron.alignment.pairwise_kernel import PairwiseKernel, float32_products

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch on Linux only"
)

# Of N = 41 rows 7 .. 36 are this rank's own. No size is a multiple of the tile, 16, nor a width of the step.
FUSED = [name for name, distance in DISTANCES.items() if distance.is_fused]
N, D, E = 41, 21, 37
OWN = slice(7, 36)
BLOCKS = [
    (slice(7, 25), slice(7, 25), False),
    (slice(7, 25), slice(25, 36), True),
    (slice(25, 36), slice(25, 36), False),
] + [(i, j, False) for i in (slice(7, 25), slice(25, 36)) for j in (slice(0, 7), slice(36, 41))]
# Scales and shifts as normalize="mean-distance" may have them.
NORMAL = (0.15, 0.06, 0.1, -0.05)


@pytest.fixture(scope="module")
def interpreter():
    """Calls functions of this file in a process in which Triton interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret) as process:
        yield lambda function, *args, **settings: process.submit(function, *args, **settings).result()


def interpret():
    os.environ["TRITON_INTERPRET"] = "1"
    # Smaller than the inputs, so that every test crosses their borders: all rows are two blocks, each of two tiles.
    loss_module._BLOCK, loss_module._BLOCK_FUSED = {"cpu": (5, 9)}, (24, 24)
    fused_blocks._TILES = (16, 16)


def pairs(case="random"):
    generator = torch.Generator().manual_seed(0)
    v_ND = torch.randn(N, D, generator=generator)
    t_NE = torch.randn(N, E, generator=generator) * 2 + 1
    if case == "duplicates":  # within a tile, within a block, in another block, on another rank
        v_ND[[9, 24, 30, 39]], t_NE[[26, 35, 2]] = v_ND[8].clone(), t_NE[10].clone()
    elif case == "zero rows":
        v_ND[[8, 9, 30]], t_NE[[8, 40]] = 0, 0
    elif case == "all equal":
        v_ND[:], t_NE[:] = v_ND[0].clone(), t_NE[0].clone()
    elif case == "not a number":
        v_ND.view(torch.int32)[12, 3] = (
            0x7FFFFFFF  # the one that GPUs write: rounded by adding to its bits, it would be -0
        )
    return v_ND, t_NE


def share(v_ND, t_NE, *, distance="euclidean", precision="ieee", normal=None, blocks=BLOCKS):
    """All that FusedBlocks knows of the own rows: rows as multiplied, w [2, n, N], row sums, sums."""
    unit = unit_rows if distance == "cosine" else lambda x: x
    kernels = [PairwiseKernel(unit(x), distance) for x in (v_ND, t_NE)]
    fused = FusedBlocks(*kernels, OWN, (18, 18), precision)
    normal_4 = None if normal is None else torch.tensor(normal)
    w_2nN = torch.full((2, OWN.stop - OWN.start, len(v_ND)), float("nan"))  # what no block covers would be seen
    for i, j, mirrored in blocks:
        for whole, w_bc in zip(w_2nN, fused.weights(i, j, mirrored, normal_4)):
            whole[i.start - OWN.start : i.stop - OWN.start, j] = w_bc.float()
            if mirrored:
                whole[j.start - OWN.start : j.stop - OWN.start, i] = w_bc.float().T
    return dict(rows=[k.x_ND for k in kernels], w=w_2nN, row_sums=fused.row_sums(), sums=fused.sums())


def expected_share(v_ND, t_NE, distance, normal=None):
    """The same from the definitions, in float64: w [2, n, N], sums."""
    kernels = [pairwise_distance(x.double(), distance=distance) for x in (v_ND, t_NE)]
    scale_v, scale_t, *shifts = normal or (1, 1, 0, 0)
    r_NN = kernels[0] * scale_v - kernels[1] * scale_t
    w = []
    for k_NN, shift in zip(kernels, shifts):
        slope_NN = {"euclidean": (1 / k_NN).where(k_NN > 0, 0.0), "sqeuclidean": 2.0, "cosine": 1.0}[distance]
        w.append(((r_NN - shift) * slope_NN).fill_diagonal_(0.0)[OWN])
    return torch.stack(w), torch.stack([x[OWN].sum() for x in (r_NN**2, *kernels)])


def value_and_gradients(v_ND, t_NE, own=slice(0, N), **settings):
    """Of one rank's rows; all of them are the whole loss."""
    rows = [x[own].clone().requires_grad_() for x in (v_ND, t_NE)]
    if own == slice(0, N):
        value = rsa_loss(*rows, **settings)
    else:
        value = rsa_loss_of_rows(*rows, v_ND, t_NE, own.start, **settings).loss
    return value.detach(), *torch.autograd.grad(value, rows)


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# u of fused_blocks.py's docstring
ROUNDING = {"tf32": 2.0**-11, "bf16": 2.0**-8}
# Of the value and of the gradients. float32: 41 roundings of 6e-8 a row, seen at most 1e-7 and 1e-6. A row's rounding moves
# distances by up to u, most of which cancels in the value (seen: u/2 for tf32, u/4 for bf16); gradients are differences of
# distances, some of them a tenth as large, times w, rounded as well (seen: 2.3 u).
TOLERANCES = {"ieee": (1e-6, 2e-6), "tf32x3": (1e-6, 2e-6)} | {name: (u, 4 * u) for name, u in ROUNDING.items()}


@needs_triton
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("distance", FUSED)
def test_loss_and_gradients_are_those_of_equation_5(interpreter, distance, normalize, precision):
    settings = dict(distance=distance, normalize=normalize)
    actual = interpreter(value_and_gradients, *pairs(), **settings, fused=precision)
    rows = [x.double().requires_grad_() for x in pairs()]
    expected = rsa_loss_reference(*rows, **settings)
    of_value, of_gradients = TOLERANCES[precision]
    assert relative(actual[0], expected.detach()) < of_value
    for x, y in zip(actual[1:], torch.autograd.grad(expected, rows)):
        assert x.dtype == torch.float32 and relative(x, y) < of_gradients


@needs_triton
@pytest.mark.parametrize("size_v, size_t", [(1e-23, 1e-23), (1e19, 1.0)])
@pytest.mark.parametrize("distance", FUSED)
def test_rows_whose_squares_no_float_holds_are_those_of_float64(interpreter, distance, size_v, size_t):
    given = [x * size for x, size in zip(pairs(), (size_v, size_t))]
    settings = dict(distance=distance, normalize="mean-distance")
    actual = interpreter(value_and_gradients, *given, **settings, fused="ieee")
    rows = [x.double().requires_grad_() for x in given]
    expected = rsa_loss_reference(*rows, **settings)
    of_value, of_gradients = TOLERANCES["ieee"]
    assert relative(actual[0], expected.detach()) < of_value
    for x, y in zip(actual[1:], torch.autograd.grad(expected, rows)):
        assert relative(x, y) < of_gradients


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("own", [OWN, slice(36, N), slice(20, 20)])
def test_a_rank_with_other_rows_around_its_own_has_its_share(interpreter, own, precision):
    actual = interpreter(value_and_gradients, *pairs(), own, fused=precision)
    expected = value_and_gradients(
        *(x.double() for x in pairs()), own
    )  # which is right (tests/unit/alignment/test_loss.py)
    of_value, of_gradients = TOLERANCES[precision]
    assert torch.allclose(actual[0].double(), expected[0], rtol=of_value, atol=0)
    for x, y in zip(actual[1:], expected[1:]):
        assert x.shape == y.shape and (x - y).norm() <= of_gradients * y.norm()


def one_gradient_and_none(v_ND, t_NE):
    value = rsa_loss(v_ND.requires_grad_(), t_NE, fused="ieee")
    value.backward()
    with torch.no_grad():
        return v_ND.grad, value.detach(), rsa_loss(v_ND, t_NE, fused="ieee")


@needs_triton
def test_a_gradient_that_nobody_wants_changes_nothing(interpreter):
    expected, *expected_gradients = interpreter(value_and_gradients, *pairs(), fused="ieee")
    gradient, *values = interpreter(one_gradient_and_none, *pairs())
    assert torch.equal(gradient, expected_gradients[0]) and all(torch.equal(value, expected) for value in values)


@needs_triton
@pytest.mark.parametrize("normal", [None, NORMAL])
@pytest.mark.parametrize("distance", FUSED)
def test_every_output_of_a_block_is_that_of_the_definitions(interpreter, distance, normal):
    actual = interpreter(share, *pairs(), distance=distance, normal=normal)
    w, sums = expected_share(*pairs(), distance, normal)
    # float32: s rounds a few times by 6e-8 of |x|^2, and r = K^V - K^T has a tenth of its terms' size here
    assert relative(actual["w"], w) < 2e-6
    assert relative(actual["row_sums"], w.sum(2)) < 2e-6
    assert relative(actual["sums"], sums) < 1e-6


@needs_triton
def test_a_block_taken_along_less_often_than_it_should_is_seen(interpreter):
    """The comparison above would fail by five orders of magnitude."""
    wrong = [(i, j, False) for i, j, _ in BLOCKS]
    actual = interpreter(share, *pairs(), blocks=wrong)
    w, sums = expected_share(*pairs(), "euclidean")
    assert relative(actual["row_sums"], w.sum(2)) > 0.1
    assert relative(actual["sums"], sums) > 0.1


@needs_triton
@pytest.mark.parametrize("case", ["duplicates", "zero rows", "all equal"])
@pytest.mark.parametrize("distance", FUSED)
def test_degenerate_rows_have_distance_0_and_no_weight(interpreter, distance, case):
    actual = interpreter(share, *pairs(case), distance=distance)
    w, sums = expected_share(*pairs(case), distance)
    assert torch.allclose(actual["sums"], sums, rtol=1e-6, atol=1e-9)
    # In cosine and sqeuclidean w = r slope stands also where K = 0; there x_i = x_j, and it comes to nothing.
    assert torch.allclose(actual["w"].double(), w, rtol=1e-5, atol=1e-5)
    if distance == "euclidean":
        assert torch.equal(actual["w"] == 0, w == 0)


@needs_triton
@pytest.mark.parametrize("precision", PRECISIONS)
def test_duplicates_of_wide_rows_are_at_distance_0(interpreter, precision):
    # 3584 products round many times: what is left of |x - x|^2 must count as nothing.
    rows = torch.randn(41, 3584, generator=torch.Generator().manual_seed(0)) * 3
    rows[25:36] = rows[7:18]
    actual = interpreter(
        share, rows, torch.zeros(41, 2), precision=precision, blocks=[(slice(7, 25), slice(25, 36), True)]
    )
    w_bc = actual["w"][0, :18, 25:36]
    assert torch.equal(w_bc == 0, torch.eye(18, 11, dtype=torch.bool))  # and no other pair is


@needs_triton
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_a_number_stays_so(interpreter, precision):
    actual = interpreter(share, *pairs("not a number"), precision=precision)
    assert actual["sums"][0].isnan() and actual["row_sums"][0].isnan().all() and actual["sums"][2].isfinite()


@needs_triton
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("precision", ROUNDING)
def test_rounded_rows_are_taken_exactly(interpreter, precision, distance):
    settings = dict(distance=distance, precision=precision)
    actual = interpreter(share, *pairs(), **settings)
    assert all(torch.equal(x, rounded_rows(x.float(), precision)) for x in actual["rows"])
    k = [torch.cdist(x.double(), x.double()) for x in actual["rows"]]
    if distance == "cosine":
        k = [0.5 * k_NN**2 for k_NN in k]
    r_nN = (k[0] - k[1])[OWN]
    # Of the rounded rows, the sums are float32's. w is rounded once more, by at most u; the interpreter does not round to
    # bfloat16 as a GPU does but cuts off, by at most 2u.
    assert relative(actual["sums"], torch.stack([(r_nN**2).sum(), k[0][OWN].sum(), k[1][OWN].sum()])) < 2e-7
    w = torch.stack([(r_nN / k_NN[OWN] if distance == "euclidean" else r_nN).nan_to_num() for k_NN in k])
    assert ((actual["w"] - w).abs() <= (2 if precision == "bf16" else 1) * ROUNDING[precision] * w.abs() + 3e-6).all()
    assert relative(actual["row_sums"], actual["w"].double().sum(2)) < 1e-6
    # of the rows as they came, they are not: the rounding did take place
    assert relative(actual["sums"], expected_share(*pairs(), distance)[1]) > 3e-6


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_rows_moves_distances_by_no_more_than_the_bound(precision):
    rows = pairs()[1] + 30 * torch.eye(N, E)
    rounded = rounded_rows(rows, precision)
    assert torch.equal(
        rounded.float(), rounded_rows(rounded.float(), precision).float()
    )  # a second time changes nothing
    moved = (torch.cdist(rounded.double(), rounded.double()) - torch.cdist(rows.double(), rows.double())).abs()
    bound = ROUNDING[precision] * (rows.double().norm(dim=1)[:, None] + rows.double().norm(dim=1))
    assert (moved <= bound).all()
    assert (moved > bound / 100).any()  # a bound that is near what it bounds


@needs_triton
def test_two_runs_give_the_same_bits(interpreter):
    first, second = (interpreter(share, *pairs()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("w", "row_sums", "sums"))


def compiled(capability, precision, tile=128):
    """Shared memory in bytes and PTX of the block kernel as FusedBlocks asks for it, for a GPU of that capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    from rsa_megatron.alignment.fused_kernel import block_kernel

    settings = fused_blocks.compile_settings(precision, tile, interpreted=False)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(offset_v=None, offset_t=None, SAME=True, MIRRORED=False, DISTANCE="euclidean", **settings)
    rows = "*bf16" if precision == "bf16" else "*fp32"
    kinds = dict.fromkeys(("v", "t", "w_v", "w_t"), rows) | dict(sums="*fp64", noise="fp32")
    kinds |= dict.fromkeys(("square_v", "square_t", "row_sums_v", "row_sums_t", "normal"), "*fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in block_kernel.arg_names}
    aligned = ("v", "t", "w_v", "w_t", "width_v", "width_t", "pitch")  # widths of real models, and what torch allocates
    attributes = {(block_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(block_kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel.metadata.shared, kernel.asm["ptx"]


@needs_triton
def test_it_compiles_to_the_instructions_meant_and_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        kernels = process.map(compiled, (80, 90), ("ieee", "tf32"))
        for (shared, ptx), instruction, is_tensor_core in zip(kernels, ("fma.rn", "wgmma.mma_async"), (False, True)):
            assert instruction in ptx
            assert ("mma" in ptx) == is_tensor_core
            assert shared <= 99 * 1024  # the least that a GPU since Ampere has (8.6 and 8.9)


def on_a_gpu():
    """Rows as far as they are looked at before anything is computed."""
    return types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"), is_cuda=True)


def test_where_it_cannot_be_had_the_reason_is_given(monkeypatch):
    v_ND, t_NE = pairs()
    with pytest.raises(ValueError, match="unknown fused 'fp16'; choose one of ieee, tf32x3, tf32, bf16, or None"):
        rsa_loss(v_ND, t_NE, fused="fp16")
    with pytest.raises(ValueError, match="fused='ieee' has no distance 'manhattan', only euclidean.*use fused=None"):
        rsa_loss(v_ND, t_NE, distance="manhattan", fused="ieee")
    with pytest.raises(ValueError, match="fused='ieee' computes in float32, and these rows are torch.float64"):
        rsa_loss(v_ND.double(), t_NE.double(), fused="ieee")
    monkeypatch.setitem(sys.modules, "triton", None)  # Python's way of saying that it is not there
    with pytest.raises(ValueError, match="fused='tf32' needs Triton, which is not installed"):
        rsa_loss(v_ND, t_NE, fused="tf32")


@needs_triton
def test_which_gpu_and_which_torch_it_needs_is_said(monkeypatch):
    with pytest.raises(ValueError, match="fused='tf32' needs an NVIDIA GPU, and these rows are on cpu"):
        rsa_loss(*pairs(), fused="tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 \(Ampere\), and this GPU has 7.5"):
        fused_blocks.check_available("ieee", "euclidean", on_a_gpu())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    with pytest.raises(ValueError, match=r"fused='bf16' needs torch 2.10, .*this is 2.9.1"):
        fused_blocks.check_available("bf16", "euclidean", on_a_gpu())
    fused_blocks.check_available("tf32", "euclidean", on_a_gpu())
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    fused_blocks.check_available("bf16", "euclidean", on_a_gpu())


def test_products_of_rounded_rows_may_use_tensor_cores_and_no_others():
    with float32_products():
        with float32_products("tf32"):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_tiles_are_wide_where_there_are_enough_of_them(monkeypatch):
    h100 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    tiles = {rows: fused_blocks._tile((rows, rows), torch.device("cuda"), "tf32") for rows in (512, 2048, 4096)}
    assert tiles == {512: 64, 2048: 64, 4096: 128}
    assert fused_blocks._tile((4096, 4096), torch.device("cuda"), "tf32x3") == 64
