"""The Triton kernels where sizes are extreme: hidden queries, numbers past 32 bits, grids past CUDA's, tiles that do not fit."""

import inspect
import itertools
import json
import math
import mmap

import pytest
import torch
from layouts import layout_id
from small_layers import HIDDEN, assert_same, make_mixer, run
from transformers.utils.import_utils import enable_tf32

from translution.modeling.kernels import basis_kernels, local_kernels, pair_kernels
from translution.modeling.operators import reference
from translution.modeling.operators.dispatch import TRITON
from translution.modeling.operators.heads import repeat_heads
from translution.modeling.operators.pair_autograd import pack
from translution.modeling.operators.pair_layout import PairLayout


pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources
from triton_devices import DEVICE, EXACT, TOLERANCE, TightDevice

from translution.modeling.kernels import launch
from translution.modeling.kernels.pair_kernels import _place_of_tile
from translution.modeling.operators import triton_basis, triton_local, triton_pairs


KERNELS = {
    name: kernel
    for module in (pair_kernels, basis_kernels, local_kernels)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
# Keys of a tile of the kernels with a basis, of the type that the comparison is made in.
KEYS = 32 if DEVICE == "cuda" else 16
IMAGE, TEXT = PairLayout.for_image(1, KEYS + 2, 1, KEYS + 2), PairLayout.for_text(KEYS + 4, KEYS + 4)


def tensor(*shape, dtype=EXACT):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def brute_force(query, key, value, query_coefficients, key_coefficients, value_coefficients, mask, scale, layout):
    """Attention with a basis, pair by pair as the formulas say it, without dense parts."""
    rows, reverse_rows = (offsets.to(query.device) for offsets in layout.offsets())
    ones = query.new_ones(layout.num_offsets, 1)
    bq, bk, bv = (
        (ones if coefficients is None else coefficients)[where.clamp(min=0)]
        for coefficients, where in (
            (query_coefficients, reverse_rows),
            (key_coefficients, rows),
            (value_coefficients, rows),
        )
    )
    scores = scale * torch.einsum("ijm,ijn,bamie,banje->baij", bq, bk, query, key)
    scores = (scores if mask is None else scores + mask).masked_fill(rows < 0, -math.inf)
    return torch.einsum("baij,ijn,banje->baie", scores.softmax(-1), bv, value)


# What is hidden


@pytest.mark.parametrize(
    ("layout", "subset", "rank"),
    [(IMAGE, "kv", None), (TEXT, "qk", 3)],
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
def test_a_first_tile_that_nobody_sees(layout, subset, rank):
    """Minus infinity for all keys of some queries' first tile; those of the next are seen."""
    factors = {"query": tensor(1), "NQ": 2, "NK": 2, "NV": 2}
    assert triton_basis._tiles(basis_kernels.forward_kernel, factors)[0]["KEYS"] == KEYS
    mixer = make_mixer(layout, subset, rank, offset_basis=2)
    queries = torch.arange(layout.num_tokens)[:, None]
    mask = torch.zeros(2, 1, layout.num_tokens, layout.num_tokens, dtype=torch.float64)
    mask[0, :, :, :KEYS].masked_fill_(queries >= KEYS, -math.inf)
    mask.masked_fill_(layout.offsets()[0] < 0, -math.inf)
    hidden_states, weight = torch.randn(2, 2, layout.num_tokens, HIDDEN, dtype=torch.float64)
    expected = run(mixer.to(DEVICE), "eager", hidden_states.to(DEVICE), layout, mask.to(DEVICE), weight.to(DEVICE))  # fmt: skip
    mixer, hidden_states, weight = mixer.to(DEVICE, EXACT), hidden_states.to(DEVICE, EXACT), weight.to(DEVICE, EXACT)
    actual = run(mixer, TRITON, hidden_states, layout, mask.to(DEVICE, EXACT), weight)
    assert all(value.isfinite().all() for value in actual.values())
    assert_same(actual, expected, TOLERANCE)


def test_a_query_that_sees_nothing_is_as_in_the_reference():
    """NaN, as any softmax over nothing, in its row and in what its gradient reaches; not in the rest of its tile or batch."""
    mixer = make_mixer(IMAGE, "kv", offset_basis=2)
    mask = torch.zeros(2, 1, IMAGE.num_tokens, IMAGE.num_tokens, dtype=torch.float64)
    mask[0, :, [3, KEYS + 1]] = -math.inf
    hidden_states, weight = torch.randn(2, 2, IMAGE.num_tokens, HIDDEN, dtype=torch.float64)
    results = []
    for implementation, dtype in (("eager", torch.float64), (TRITON, EXACT)):
        moved = (t.to(DEVICE, dtype) for t in (hidden_states, mask, weight))
        hidden, seen, by = moved
        results.append(run(mixer.to(DEVICE, dtype), implementation, hidden, IMAGE, seen, by))
    expected, actual = results
    for name in ("output", "input"):
        assert expected[name].isnan().any(), name
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
        assert expected[name].isfinite().any(), name
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=100 * TOLERANCE, atol=TOLERANCE, equal_nan=True
        )
    for name, parameter in expected.items():
        assert (actual[name].isnan() | ~parameter.isnan()).all(), name


# Corners of the operator with a basis


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        (PairLayout.for_image(1, 2, 1, 2), "baij"),
        (PairLayout.for_text(1, 1), ""),
        (PairLayout.for_text(7, 9, past=3), ""),
        (PairLayout.for_text(7, 9, past=3), "j"),
        (PairLayout.for_text(7, 9, past=3), "ij"),
        (PairLayout.for_text(7, 9, past=3), "bij"),
    ],
    ids=lambda value: value if isinstance(value, str) else layout_id(value),
)
def test_masks_of_every_shape_and_tokens_of_any_strides(layout, axes):
    """Sizes that are no power of two, memory in another order, masks that are the same along some axes."""
    batch, heads, queries, tokens = 2, 2, layout.num_queries, layout.num_tokens
    query = tensor(5, queries, batch, 1, heads).permute(2, 4, 3, 1, 0).requires_grad_()
    key = tensor(batch, tokens, 2, heads, 5).permute(0, 3, 2, 1, 4).requires_grad_()
    value = tensor(batch, 2, heads, 2 * tokens, 7)[:, :, :, ::2].transpose(1, 2).requires_grad_()
    key_coefficients, value_coefficients = (
        tensor(2, layout.num_offsets).t().requires_grad_(),
        tensor(layout.num_offsets, 2).requires_grad_(),
    )
    sizes = {"b": batch, "a": heads, "i": queries, "j": tokens}
    mask = tensor(*(sizes[axis] for axis in axes)) if axes else None
    if axes == "bij":
        mask = mask[:, None]
    inputs = (query, key, value, key_coefficients, value_coefficients)
    weight = tensor(heads, batch, queries, 7).transpose(0, 1)
    coefficients = (None, key_coefficients, value_coefficients)
    expected = brute_force(query, key, value, *coefficients, mask, 0.5, layout)
    actual, _ = triton_basis.basis_attention(query, key, value, *coefficients, None, None, None, mask, 0.5, layout)
    gradients = [torch.autograd.grad((result * weight).sum(), inputs) for result in (actual, expected)]
    # Where a query sees one key alone its probability is 1, and some gradients are rounding about 0.
    bound = {"rtol": 100 * TOLERANCE, "atol": 10 * TOLERANCE}
    for one, other in zip((actual, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, **bound)


@pytest.mark.parametrize(
    ("layout", "key_heads", "groups", "query_factors", "dense"),
    [
        (PairLayout.for_image(1, 2, 1, 2), 2, 2, 2, False),
        (PairLayout.for_text(KEYS + 2, 5, 4, past=1), 1, 3, 1, True),
    ],
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_heads_of_queries_share_one_of_keys_and_values(layout, key_heads, groups, query_factors, dense):
    """Outputs and every gradient, against keys and values repeated for the heads that share them."""
    batch, heads, queries, tokens = 2, key_heads * groups, layout.num_queries, layout.num_tokens
    given = dict.fromkeys(triton_basis._NAMES)
    given["query"] = tensor(batch, heads, query_factors, queries, 5)
    given["key"], given["value"] = tensor(batch, key_heads, 2, tokens, 5), tensor(batch, key_heads, 2, tokens, 7)
    given["key_coefficients"], given["value_coefficients"] = (tensor(layout.num_offsets, 2) for _ in range(2))
    if query_factors > 1:
        given["query_coefficients"] = tensor(layout.num_offsets, query_factors)
    if dense:
        given["dense_query"] = tensor(batch, heads, queries, 3)
        given["dense_key"], given["dense_value"] = (tensor(batch, key_heads, tokens, 3) for _ in range(2))
    inputs = [part.requires_grad_() for part in given.values() if part is not None]
    mask = tensor(batch, heads, queries, tokens) if dense else None

    repeated = dict(given)
    for name in ("key", "value", "dense_key", "dense_value"):
        repeated[name] = repeat_heads(given[name], groups)
    q, k, v, *coefficients, dense_query, dense_key, dense_value = repeated.values()
    bias = mask + 0.5 * dense_query @ dense_key.transpose(-1, -2) if dense else mask
    expected = [brute_force(q, k, v, *coefficients, bias, 0.5, layout)]
    if dense:
        expected.append(brute_force(q, k, dense_value[:, :, None], *coefficients[:2], None, bias, 0.5, layout))
    actual = triton_basis.basis_attention(*given.values(), mask, 0.5, layout)[: len(expected)]
    gradients = [
        torch.autograd.grad(sum(part.square().sum() for part in result), inputs) for result in (actual, expected)
    ]
    for one, other in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=100 * TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (PairLayout.for_image(2, 3, 2, 3, class_token=False), (3, 1, 5)),
        (PairLayout.for_text(KEYS + 2, 5, 4, past=1), (1, 5, 3)),
        (PairLayout.for_image(1, 2, 1, 2), (3, 3, 1)),
    ],
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_more_factors_than_a_tile_holds(layout, numbers, monkeypatch):
    """Outputs and every gradient, of factors that fill a tile's places in part; of each kind another number."""
    small = ((32, 32, 2, 4, 1),)
    monkeypatch.setattr(triton_basis, "_TILES", {name: {EXACT.itemsize: small} for name in triton_basis._TILES})
    lengths = (layout.num_queries, layout.num_tokens, layout.num_tokens)
    tokens = [tensor(1, 2, number, length, 5) for number, length in zip(numbers, lengths, strict=True)]
    coefficients = [tensor(layout.num_offsets, number) if number > 1 else None for number in numbers]
    inputs = [part.requires_grad_() for part in (*tokens, *coefficients) if part is not None]
    weight = tensor(1, 2, layout.num_queries, 5)
    expected = brute_force(*tokens, *coefficients, None, 0.5, layout)
    actual, _ = triton_basis.basis_attention(*tokens, *coefficients, None, None, None, None, 0.5, layout)
    gradients = [torch.autograd.grad((result * weight).sum(), inputs) for result in (actual, expected)]
    for one, other in zip((actual, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=100 * TOLERANCE, atol=10 * TOLERANCE)


def test_nothing_is_read_beyond_the_coefficients(monkeypatch):
    """Pairs that a tile has and the grid has not have a place in the bank all the same: what lies around it is NaN."""
    layout = PairLayout.for_image(2, 3, 2, 3, class_token=False)
    made = triton_basis._for_kernels

    def surrounded(given):
        tensors = made(given)
        for name, inner in tensors.items():
            if name.endswith("coefficients") and inner is not None:
                around = inner.new_full((inner.numel() + 128,), math.nan)
                tensors[name] = around[64:-64].view_as(inner).copy_(inner)
        return tensors

    monkeypatch.setattr(triton_basis, "_for_kernels", surrounded)
    # Queries of one factor: a tile has more of them than a row of the grid.
    tokens = [tensor(1, 1, factors, layout.num_tokens, 4) for factors in (1, 2, 2)]
    coefficients = [tensor(layout.num_offsets, 2) for _ in range(2)]
    inputs = [part.requires_grad_() for part in (*tokens, *coefficients)]
    output, _ = triton_basis.basis_attention(*tokens, None, *coefficients, None, None, None, None, 0.5, layout)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.square().sum(), inputs))


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (2, 1, 1)], ids=str)
def test_products_of_each_kernel(factors, checked_integers, monkeypatch):
    """As many as the docstring says: all factors' gradients from scores that are computed again once."""
    layout = PairLayout.for_image(4, 8, 4, 8, class_token=False)
    query, key, value = (tensor(1, 1, number, 32, 16).requires_grad_() for number in factors)
    coefficients = [tensor(layout.num_offsets, number).requires_grad_() if number > 1 else None for number in factors]
    multiply, run_kernel, products = interpreter.InterpreterBuilder.create_dot, launch.launch, {}

    def counted(self, a, b, *arguments):
        (rows, terms), (_, columns) = a.data.shape, b.data.shape
        products[running[0]] = products.get(running[0], 0) + rows * terms * columns
        return multiply(self, a, b, *arguments)

    def note(kernel, *arguments, **named):
        running[:] = [kernel.__name__]
        run_kernel(kernel, *arguments, **named)

    running = []
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(triton_basis, "launch", note)
    output, _ = triton_basis.basis_attention(query, key, value, *coefficients, None, None, None, None, 0.5, layout)
    output.sum().backward()
    of_scores, of_values = factors[0] * factors[1], factors[2]
    # Tiles that the tokens fill: 32 queries and keys of 16 features.
    unit = 32 * 32 * 16
    assert products["forward_kernel"] == unit * (of_scores + of_values)
    assert products["query_gradient_kernel"] == unit * (2 * of_scores + of_values)
    assert products["key_value_gradient_kernel"] == unit * 2 * (of_scores + of_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("dense", "query_basis", "most"), [(True, True, 4), (False, True, 8), (True, False, 8)])
def test_a_dense_part_beside_all_coefficients_leaves_room_for_few_factors(dense, query_basis, most, dtype):
    arguments = {"query": torch.empty(0, dtype=dtype), "NQ": 8, "NK": 8, "NV": 8}
    arguments |= {"DENSE_SCORES": dense, "Q_BASIS": query_basis, "K_BASIS": True}
    for kernel in (basis_kernels.coefficient_gradient_kernel, basis_kernels.key_value_gradient_kernel):
        options = triton_basis._tiles(kernel, arguments)
        held = max(option[f"{name}_FACTORS"] for option in options for name in ("QUERY", "KEY", "VALUE"))
        wanted = most if kernel is basis_kernels.coefficient_gradient_kernel else 8
        assert held == min(wanted, {2: 8, 4: 4, 8: 2}[dtype.itemsize])


def test_heads_that_do_not_match_are_an_error():
    layout = PairLayout.for_text(2, 2)
    heads = {count: tensor(1, count, 1, 2, 4) for count in (2, 3, 4)}
    rest = (None, tensor(2, 1), tensor(2, 1), None, None, None, None, 1.0, layout)
    with pytest.raises(ValueError, match="`key` must divide the 4 of `query`, got 3"):
        triton_basis.basis_attention(heads[4], heads[3], heads[3], *rest)
    with pytest.raises(ValueError, match="`value` must have 2 heads, got 4"):
        triton_basis.basis_attention(heads[4], heads[2], heads[4], *rest)


@pytest.mark.parametrize("layout", [PairLayout.for_image(2, 3, 2, 3), PairLayout.for_text(4, 4)], ids=layout_id)
def test_an_empty_batch(layout):
    tokens = layout.num_tokens
    bank = tensor(layout.num_offsets, 4, 6).requires_grad_()
    hidden = tensor(0, tokens, 4).requires_grad_()
    scores = triton_pairs.pair_scores(hidden, hidden, bank, bank, 2, layout)
    assert scores.shape == (0, 2, tokens, tokens)
    values = triton_pairs.pair_values(scores, hidden, bank, layout)
    assert values.shape == (0, tokens, 6)
    coefficients = tensor(layout.num_offsets, 2).requires_grad_()
    heads = tensor(0, 2, 2, tokens, 3)
    output, _ = triton_basis.basis_attention(heads[:, :, :1], heads, heads, None, coefficients, coefficients, None, None, None, None, 1.0, layout)  # fmt: skip
    assert output.shape == (0, 2, tokens, 3)
    (values.sum() + output.sum()).backward()
    assert not bank.grad.any()
    assert not coefficients.grad.any()


# Numbers past 32 bits


def spread(dense: torch.Tensor, axes: int) -> torch.Tensor:
    """The same numbers far apart: of each of the first axes the last element lies 2³¹ elements behind the first.

    In memory of which only the pages that are touched exist. A stride itself has 31 bits.
    """
    apart, inner = [], math.prod(dense.shape[axes:])
    for axis, size in enumerate(dense.shape[:axes]):
        apart.append(2**31 // (size - 1) + 1 + 16**axis * inner)
        assert size >= 3  # of two the stride would have to have 32 bits, and Triton would take 64
    strides = (*apart, *dense.contiguous().stride()[axes:])
    size = 1 + sum(stride * (size - 1) for stride, size in zip(strides, dense.shape, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, size * dense.element_size(), flags=flags), dtype=dense.dtype)
    places = torch.zeros(1, dtype=torch.int64)
    for stride, length in zip(strides, dense.shape, strict=True):
        places = (places[:, None] + stride * torch.arange(length)).flatten()
    assert len(places.unique()) == dense.numel()
    return memory.as_strided(dense.shape, strides).copy_(dense)


@pytest.fixture
def checked_integers(monkeypatch):
    """Triton's interpreter, which raises an error where 32 bits do not hold a sum or a product."""
    if DEVICE == "cuda":
        pytest.skip(
            "memory of which only the touched pages exist is a processor's; the interpreter runs without a GPU"
        )
    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    )


def launch_with_tensors_far_apart(kernel, grid, options, derived, **arguments):
    """`launch`, with all tensors that have strides spread over more than 2³¹ elements."""
    results = {}
    for name, dense in list(arguments.items()):
        prefix = {"scores": "score", "weights": "weight", "tokens": "token", "others": "other"}.get(name, name)
        axes = sum(f"{prefix}_strides_{axis}" in arguments for axis in "pbaijl")
        if axes and isinstance(dense, torch.Tensor):
            arguments[name] = results[name] = spread(dense, axes)
            order = "baij"
            if f"{prefix}_strides_l" in arguments:
                order = "pbl" if f"{prefix}_strides_p" in arguments else "bl"
            for axis, stride in zip(order, results[name].stride(), strict=False):
                if f"{prefix}_strides_{axis}" in arguments:
                    arguments[f"{prefix}_strides_{axis}"] = stride
            results[name] = (dense, results[name])
    assert results
    launch.launch(kernel, grid, options, derived, **arguments)
    written = {"scores", "output"} & set(results)
    for dense, apart in (results[name] for name in written):
        dense.copy_(apart)


@pytest.mark.parametrize(
    ("layout", "groups"),
    [(PairLayout.for_image(2, 2, 2, 2), 1), (PairLayout.for_text(4, 4), 2)],
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
def test_pairs_with_more_than_2_to_31_elements(layout, groups, checked_integers, monkeypatch):
    monkeypatch.setattr(triton_pairs, "launch", launch_with_tensors_far_apart)
    monkeypatch.setattr(triton_pairs, "_num_parts", lambda *given: 3)
    heads, tokens = 3 * groups, layout.num_tokens
    query, key = (tensor(3, tokens, 4).requires_grad_() for _ in range(2))
    banks = [tensor(layout.num_offsets, 4, width * 2).requires_grad_() for width in (heads, 3)]
    pairs = tensor(3, heads, tokens, tokens)
    results = []
    for module in (triton_pairs, reference):
        scores = module.pair_scores(query, key, *banks, heads, layout)
        values = module.pair_values(pairs, key, banks[1], layout, groups)
        gradients = torch.autograd.grad((scores * pairs).sum() + values.square().sum(), (query, key, *banks))
        results.append((scores, values, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=100 * TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layout", [PairLayout.for_image(1, 2, 1, 2), PairLayout.for_text(3, 3)], ids=layout_id)
def test_a_mask_with_more_than_2_to_31_elements(layout, checked_integers):
    tokens = layout.num_tokens
    query, key = tensor(3, 3, 1, tokens, 4).requires_grad_(), tensor(3, 3, 2, tokens, 4).requires_grad_()
    coefficients = tensor(layout.num_offsets, 2).requires_grad_()
    mask = tensor(3, 3, tokens, tokens)
    inputs, given = (query, key, coefficients), (query, key, key, None, coefficients, coefficients)
    far, _ = triton_basis.basis_attention(*given, None, None, None, spread(mask, 4), 0.5, layout)
    expected = brute_force(*given, mask, 0.5, layout)
    gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in (far, expected)]
    for actual, wanted in zip((far, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=100 * TOLERANCE, atol=TOLERANCE)


@triton.jit
def locate(output, tile, batch, height, width, past, least_row, most_row, least, most, class_row, CLASS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip # noqa: N803
    row_offset, column_offset, start, count, before, kind = _place_of_tile(
        tile, batch, height, width, past, least_row, most_row, least, most, class_row, CLASS, ROWS
    )
    tl.store(output, row_offset)
    tl.store(output + 1, column_offset)
    tl.store(output + 2, start)
    tl.store(output + 3, count)
    tl.store(output + 4, before)
    tl.store(output + 5, kind)


@pytest.mark.parametrize(
    ("layout", "batch", "tiles"),
    [
        (PairLayout.for_image(2, 3, 2, 3), 5, None),
        (PairLayout.for_text(5, 5, past=2), 9, None),
        (PairLayout.for_text(90_000, 90_000, past=10_000), 3, (0, 1, 600_000_000, -1)),
        (PairLayout.for_image(250, 250, 250, 250), 3, (0, 300_000_000, -30_000, -20_000, -1)),
    ],
    ids=lambda value: layout_id(value) if isinstance(value, PairLayout) else str(value),
)
@pytest.mark.usefixtures("checked_integers")
def test_tiles_of_pairs_are_where_counting_puts_them(layout, batch, tiles):
    """Every pair in one tile, in the order of the offsets, then of a class token's kinds; of more than 2³¹ pairs too."""
    rows, geometry = 16, triton_pairs._geometry(layout, batch)
    offsets = [
        (x, y, -1)
        for x in range(geometry.least_row, geometry.most_row + 1)
        for y in range(geometry.least, geometry.most + 1)
    ]
    counts = [
        batch * (geometry.height - abs(x)) * (geometry.width + min(y, 0) - max(y, geometry.past))
        for x, y, _ in offsets
    ]
    if layout.class_token:
        offsets += [(0, 0, kind) for kind in range(3)]
        counts += [batch, batch * (layout.num_tokens - 1), batch * (layout.num_tokens - 1)]
    before = dict(zip(offsets, itertools.accumulate(counts, initial=0), strict=False))
    count = dict(zip(offsets, counts, strict=True))
    number = triton_pairs._num_pair_tiles(geometry, batch, {"ROWS": rows})
    found, kinds = [], set()
    for tile in range(number) if tiles is None else tiles:
        output = torch.zeros(6, dtype=torch.int64, device=DEVICE)
        numbers = (batch, geometry.height, geometry.width, geometry.past, geometry.least_row, geometry.most_row)
        locate[(1,)](output, tile % number, *numbers, geometry.least, geometry.most, geometry.class_row, layout.class_token, rows)  # fmt: skip
        x, y, start, length, pairs, kind = output.tolist()
        offset = (x, y, kind) if kind < 0 else (0, 0, kind)
        assert pairs == before[offset]
        assert length == count[offset]
        assert 0 <= start < count[offset] + rows
        found += [(pairs + pair) for pair in range(start, min(start + rows, length))]
        kinds.add(kind)
    if tiles is None:
        assert found == list(range(sum(counts)))
    assert found == sorted(set(found))
    assert kinds == (
        {-1, 0, 1, 2} if layout.class_token and tiles is None else {-1, 1, 2} if layout.class_token else {-1}
    )


def test_more_tokens_than_kernels_can_number():
    layout = PairLayout.for_text(2, 2)
    hidden = torch.empty(1, 2, 4, device="meta").expand(2**30, -1, -1)
    bank = torch.empty(2, 4, 4, device="meta")
    for call in (
        lambda: triton_pairs._scores(hidden, hidden, bank, bank, 1, layout),
        lambda: triton_pairs._values(torch.empty(1, 1, 2, 2, device="meta"), hidden, bank, layout),
    ):
        with pytest.raises(ValueError, match=r"batch of 1073741824 × 2 tokens is larger than the 2147482624"):
            call()


# Grids


class Launches:
    """Takes the place of `launch`, and keeps the grid of every option."""

    def __init__(self, monkeypatch):
        self.grids = {}
        for module in (triton_pairs, triton_basis, triton_local):
            monkeypatch.setattr(module, "launch", self)

    def __call__(self, kernel, grid, options, derived, **arguments):
        self.grids.setdefault(kernel.__name__, []).extend(grid(option) for option in options)

    def assert_allowed(self):
        for name, grids in self.grids.items():
            for grid in grids:
                assert grid[0] < 2**31, name
                assert all(programs <= 65535 for programs in grid[1:]), (name, grid)


def empty(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def launch_pairs(batch, layout):
    hidden, bank = empty(batch, layout.num_tokens, 64), empty(layout.num_offsets, 64, 64)
    pairs = empty(batch, 8, layout.num_tokens, layout.num_tokens)
    triton_pairs._scores(hidden, hidden, bank, bank, 8, layout)
    triton_pairs._values(pairs, hidden, bank, layout)
    triton_pairs._scores_backward(pairs, hidden, hidden, bank, bank, layout, True, True)


def launch_basis(batch, layout):
    one, factors = empty(batch, 8, 1, layout.num_tokens, 8), empty(batch, 8, 4, layout.num_tokens, 8)
    coefficients = empty(layout.num_offsets, 4).float()
    given = (one, factors, factors, None, coefficients, coefficients, None, None, None, None, 1.0, pack(layout))
    output, dense, logsumexp = triton_basis._basis_attention(*given)
    triton_basis._basis_attention_backward(output, dense, output, dense, logsumexp, *given)


def launch_local(batch, tokens):
    layout = PairLayout.for_text(tokens, tokens, 3).near(0)
    each = [empty(batch, tokens, 64) for _ in range(3)]
    output, logsumexp, scores = triton_local._forward(each[:1], each, each, [], None, None, 8, 1.0, layout)
    triton_local._backward(output, output, logsumexp, scores, each[:1], each, each, [], None, 8, 1.0, layout)


@pytest.mark.parametrize("layout", [PairLayout.for_image(2, 2, 2, 2), PairLayout.for_text(4, 4)], ids=layout_id)
def test_grids_of_many_inputs_are_as_cuda_allows(layout, monkeypatch):
    launches = Launches(monkeypatch)
    launch_pairs(70_000, layout)
    launch_basis(70_000, layout)
    launch_local(70_000, 4)
    assert set(launches.grids) == set(KERNELS)
    launches.assert_allowed()


@pytest.mark.parametrize("layout", [PairLayout.for_image(2, 600_000, 2, 600_000), PairLayout.for_text(1_200_000, 1_200_000)], ids=layout_id)  # fmt: skip
def test_grids_of_many_tokens_are_as_cuda_allows(layout, monkeypatch):
    """With a basis or a distance: without, the pairs of so many could not be held."""
    launches = Launches(monkeypatch)
    launch_basis(1, layout)
    launch_local(1, layout.num_tokens)
    assert set(launches.grids) == {name for name in KERNELS if not hasattr(pair_kernels, name)}
    launches.assert_allowed()


def test_a_grid_that_cuda_does_not_allow_is_an_error_that_says_so():
    kernel = TightDevice(16)
    for grid in ((2**31,), (1, 65536), (1, 1, 65536)):
        with pytest.raises(RuntimeError, match=r"tight needs \(.*\) programs .* `TRANSLUTION_TRITON=0`"):
            launch.launch(
                kernel, lambda option, grid=grid: grid, [{"ROWS": 16}], lambda option: {}, tokens=torch.zeros(1)
            )
    assert kernel.tried == []


# Tiles that do not fit, and precision


class Picky(TightDevice):
    """A kernel that fits in tiles of any size, but for wide heads in small ones alone."""

    def __getitem__(self, programs):
        start = super().__getitem__(programs)

        def choose(ROWS, WIDTH, **arguments):  # noqa: N803
            self.tried.append((ROWS, WIDTH)) if WIDTH <= 64 else start(ROWS)

        return choose


@pytest.mark.parametrize("where", ["arguments", "derived"])
def test_what_does_not_fit_is_known_for_what_is_compiled(where):
    """One shape's tiles say nothing of another's, whichever comes first; lengths and strides do not count."""
    options = [{"ROWS": rows} for rows in (128, 64, 32)]
    kernel = Picky(64)
    kernel.__name__ = f"picky_by_{where}"

    def tried(width, length=1001, tokens=None):
        kernel.tried = []
        shape = {"WIDTH": width}
        given = shape if where == "arguments" else {}
        tokens = torch.zeros(4) if tokens is None else tokens
        derived = {} if where == "arguments" else shape
        launch.launch(kernel, lambda option: (1,), options, lambda option: derived, tokens=tokens, length=length, scale=length / 7, **given)  # fmt: skip
        return kernel.tried

    assert tried(256) == [128, 64]
    assert tried(64) == [(128, 64)]
    assert tried(256) == [64]
    assert tried(256, length=2003) == [64]
    assert tried(64) == [(128, 64)]
    assert tried(256, tokens=torch.zeros(4, dtype=torch.bfloat16)) == [128, 64]
    assert tried(512) == [128, 64]


def test_lengths_of_a_chunk_are_no_problem_of_their_own():
    """Triton compiles once for all chunks of offsets, so that their tile is chosen once; types and strides do count."""
    kernel, tokens = KERNELS["projection_kernel"], torch.zeros(4)

    def problem(**numbers):
        given = {"tokens": tokens, "least": -5, "most_row": 1, "token_strides_b": 32, "C": 16} | numbers
        return launch._problem(kernel, tokens.device, [{"ROWS": 16}], given)

    assert problem(least=1, most_row=16) == problem()
    assert problem(least=2**31) != problem()
    assert problem(token_strides_b=33) != problem()


def test_constants_of_kernels_have_names_in_capitals():
    """`launch` tells by their names what a kernel is compiled for."""
    for name, kernel in KERNELS.items():
        parameters = inspect.signature(kernel.fn).parameters.values()
        assert {p.name for p in parameters if "constexpr" in str(p.annotation)} == {
            p.name for p in parameters if p.name.isupper()
        }, name


@pytest.fixture
def tf32_restored():
    """Whatever was said of float32's precision before a test, and in it, is forgotten."""
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
    else:
        torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    # Of what PyTorch has two switches for, both say the same then: where they do not, the older one cannot be read.
    torch.set_float32_matmul_precision("highest")


def test_precision_is_what_the_trainer_asks_of_pytorch(tf32_restored):
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert launch.dot_precision(single) == "ieee"
    enable_tf32(True)  # `TrainingArguments(tf32=True)` calls this
    assert launch.dot_precision(single) == "tf32"
    assert launch.dot_precision(double) == "ieee"
    enable_tf32(False)
    assert launch.dot_precision(single) == "ieee"


def test_precision_by_the_older_switches(tf32_restored, monkeypatch):
    single = torch.zeros(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert launch.dot_precision(single) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert launch.dot_precision(single) == "ieee"

    class Older:
        """The settings before PyTorch 2.9."""

        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Older())
    assert launch.dot_precision(single) == "tf32"


def test_rocm_computes_float32_as_it_is(tf32_restored, monkeypatch):
    """Triton refuses TF32 on most of AMD's GPUs, and PyTorch computes without it there."""
    torch.backends.cuda.matmul.allow_tf32 = True
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.dot_precision(torch.zeros(1)) == "ieee"


class Spilling:
    """A kernel that fits with tiles of at most `rows`, and spills as many registers as `spills` says of each."""

    __name__ = "spilling"

    def __init__(self, rows, spills):
        self.rows, self.spills, self.ran = rows, spills, []

    def __getitem__(self, programs):
        return lambda ROWS, **arguments: self.ran.append(ROWS)  # noqa: N803

    def spills_of(self, kernel, programs, arguments):
        if self.rows < arguments["ROWS"]:
            raise OutOfResources(arguments["ROWS"], self.rows, "shared memory")
        return self.spills[arguments["ROWS"]]


def run_spilling(kernel, monkeypatch, **arguments):
    monkeypatch.setattr(launch, "_spills", kernel.spills_of)
    options = [{"ROWS": rows} for rows in (128, 64, 32)]
    for _ in range(2):
        launch.launch(kernel, lambda option: (1,), options, lambda option: {}, tokens=torch.zeros(1), **arguments)
    return kernel.ran


def test_tiles_that_spill_registers_come_last(monkeypatch):
    few = launch.MAX_SPILLS
    assert run_spilling(Spilling(128, {128: few + 1, 64: few, 32: 0}), monkeypatch) == [64, 64]
    # Where all spill, those that spill least.
    assert run_spilling(Spilling(128, {128: few + 3, 64: few + 1, 32: few + 2}), monkeypatch) == [64, 64]
    # What does not fit does not count.
    assert run_spilling(Spilling(64, {128: 0, 64: few + 2, 32: few + 3}), monkeypatch) == [64, 64]


def test_tiles_that_were_measured_to_be_best_come_first(monkeypatch, tmp_path):
    arguments = {"tokens": torch.zeros(1, dtype=torch.bfloat16), "C": 192, "height": 1, "batch": 8}
    key = launch.tuning_key(Spilling(0, {}), arguments)
    assert key == "spilling bfloat16 C=192 height=1"
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"some GPU": {key: {"ROWS": 64}}}), encoding="utf-8")
    monkeypatch.setattr(launch, "TUNED", tuned)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    launch.tuned_options.cache_clear()
    options = [{"ROWS": 128}, {"ROWS": 64}]

    class OnGPU:
        device = torch.device("cuda")

    def order(kernel, found, options=options):
        return launch._in_order(kernel, OnGPU, options, found)

    assert order(Spilling(0, {}), arguments) == options[::-1]
    # Of another type, with other constants, or with parameters that the measurement did not know: the list decides.
    assert order(Spilling(0, {}), arguments | {"tokens": torch.zeros(1)}) == options
    assert order(Spilling(0, {}), arguments | {"C": 768}) == options
    assert order(Spilling(0, {}), arguments, [{"ROWS": 128, "STEPS": 1}]) == [{"ROWS": 128, "STEPS": 1}]
    launch.tuned_options.cache_clear()
    # In a checkpoint that carries its code there is no such file.
    monkeypatch.setattr(launch, "TUNED", tmp_path / "nowhere.json")
    assert order(Spilling(0, {}), arguments) == options
    launch.tuned_options.cache_clear()
