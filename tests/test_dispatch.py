"""Which implementation serves a call: one test for each row of the table in `dispatch.py`."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from small_models import make_config, make_inputs, make_model, num_tokens
from transformers import StaticCache

from translution import TranslutionForImageClassification, explain_dispatch
from translution.modeling.operators import dispatch
from translution.modeling.operators.dispatch import AUTO, EAGER, TRITON, Call, choose_path
from translution.modeling.operators.pair_layout import PairLayout, StepLayout


# Here with Triton's interpreter, if it is on: the tests below turn it off, and others of this process need it.
with contextlib.suppress(ImportError):
    dispatch._load()

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TEXT, IMAGE = PairLayout.for_text(9, 9), PairLayout.for_image(3, 4, 3, 4)
FAR_TEXT, FAR_IMAGE = PairLayout.for_text(9, 9, 3), PairLayout.for_image(7, 8, 7, 8, 1, share_far=True)
# More offsets with a matrix of their own than are worth keeping for a backward pass.
WIDE_TEXT, WIDE_IMAGE = PairLayout.for_text(99, 99, 70), PairLayout.for_image(9, 9, 9, 9, 6, share_far=True)
CLAMPED_STEP, CLAMPED_IMAGE = StepLayout(4, 9, 3, True), PairLayout.for_image(5, 6, 5, 6, 1)
STEP, SEVERAL = StepLayout(4, 9, 9, False), StepLayout(4, 9, 9, False, num_queries=3)


def call(kind="full", layout=IMAGE, device=CPU, **fields):
    return Call(kind, 0, layout, 8, device, torch.float32, **fields)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU, of the capability that a test may set."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


ROWS = {
    "reference-eager": (call(wish=EAGER), "reference", "eager"),
    "reference-weights": (call(wants_weights=True), "reference", "attention weights are asked for"),
    "reference-basis": (call("basis", wish=EAGER), "reference", "eager"),
    "decode": (call(layout=STEP, cached=True), "decode", "one new token"),
    "decode-basis": (call("basis", layout=STEP, cached=True), "decode", "one new token"),
    "several-tokens": (call(layout=SEVERAL, cached=True), "gathered", "static cache"),
    "several-tokens-basis": (call("basis", layout=SEVERAL, cached=True), "basis", "static cache"),
    "local-text": (call(layout=FAR_TEXT), "local", "near pairs"),
    "local-image": (call(layout=FAR_IMAGE), "local", "near pairs"),
    "local-low-rank": (call("low_rank", FAR_IMAGE), "local", "near pairs"),
    "local-basis": (call("basis", FAR_TEXT), "local", "near pairs"),
    "local-mask": (call(layout=FAR_TEXT, masked=True, hides_pairs=True), "local", "near pairs"),
    "local-past": (call(layout=PairLayout.for_text(9, 9, 3, past=2), cached=True), "local", "near pairs"),
    "local-rotated": (call(layout=FAR_IMAGE, rotated=True), "local", "near pairs"),
    "local-rotated-wide": (call(layout=WIDE_IMAGE, rotated=True), "local", "near pairs"),
    "reference-rotated-dropout": (call(layout=FAR_IMAGE, rotated=True, drops=True), "reference", "no other path rotates"),
    "grouped-rotated-dropout": (call(layout=FAR_TEXT, rotated=True, drops=True), "grouped", "dropout"),
    "grouped-far-dropout": (call(layout=FAR_IMAGE, drops=True), "grouped", "dropout"),
    "local-clamped": (call(layout=CLAMPED_IMAGE, relative="kv"), "local", "near pairs"),
    "clamped-queries": (call(layout=CLAMPED_IMAGE, relative="qk"), "streamed", "one pass"),
    "local-step": (call(layout=CLAMPED_STEP, relative="kv", cached=True), "local_step", "one new token"),
    "decode-dropout": (call(layout=CLAMPED_STEP, relative="kv", cached=True, drops=True), "decode", "one new token"),
    "decode-distance": (call(layout=CLAMPED_STEP, relative="v", cached=True), "decode", "one new token"),
    "basis": (call("basis"), "basis", "need a GPU"),
    "basis-dropout": (call("basis", FAR_TEXT, drops=True), "basis", "need a GPU"),
    "streamed-text": (call(layout=TEXT), "streamed", "one pass"),
    "streamed-near-text": (call(layout=PairLayout.for_text(3, 9, 3)), "streamed", "one pass"),
    "grouped-far-text": (call(layout=PairLayout.for_text(9, 9, 0)), "grouped", "far pairs"),
    "grouped-wide-text": (call(layout=WIDE_TEXT), "grouped", "far pairs"),
    "streamed-wide-image": (call(layout=WIDE_IMAGE), "streamed", "one pass"),
    "streamed-image": (call(), "streamed", "one pass"),
    "streamed-clamped-image": (call(layout=PairLayout.for_image(9, 10, 9, 10, 4)), "streamed", "one pass"),
    "grouped-low-rank": (call("low_rank", TEXT), "grouped", "low-rank"),
    "grouped-mask": (call(layout=TEXT, masked=True), "grouped", "a mask"),
    "grouped-dropout": (call(layout=TEXT, drops=True), "grouped", "dropout"),
    "grouped-past": (call(layout=PairLayout.for_text(9, 9, past=2), cached=True), "grouped", "a cache"),
    "attention": (call("attention"), "sdpa", "PyTorch"),
    "relative-bias": (call("relative_bias"), "sdpa", "PyTorch"),
    "attention-eager": (call("attention", wish=EAGER), "reference", "eager"),
    "attention-weights": (call("attention", layout=STEP, wants_weights=True), "reference", "attention weights"),
    "relative-vector": (call("relative_vector"), "products", "vectors"),
    "convolution": (call("convolution"), "conv", "PyTorch"),
    "convolution-tokens": (call("convolution", masked=True), "conv", "PyTorch"),
    "convolution-pairs": (call("convolution", masked=True, hides_pairs=True), "grouped", "a mask hides pairs"),
    "window-cache": (call("convolution", TEXT, cached=True), "window", "cache"),
    "window-pairs": (call("convolution", TEXT, masked=True, hides_pairs=True), "window", "mask of pairs"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_table(row):
    wanted, path, reason = ROWS[row]
    choice = choose_path(wanted)
    assert choice.path == path
    assert reason in choice.reason


ON_A_GPU = {
    "pair_kernels": (call(device=CUDA), "pair_kernels", "CUDA kernels"),
    "pair_kernels-low-rank": (call("low_rank", TEXT, CUDA, masked=True), "pair_kernels", "CUDA kernels"),
    "basis_kernel": (call("basis", device=CUDA), "basis_kernel", "one CUDA kernel"),
    "basis-dropout": (call("basis", device=CUDA, drops=True), "basis", "dropout"),
    "basis-distance-and-cache": (call("basis", PairLayout.for_text(9, 9, 0), CUDA, cached=True), "basis", "a cache"),
    "wide-heads": (call(device=CUDA)._replace(head_size=512), "grouped_gemm", "512 features are larger"),
    "far-text": (call("full", WIDE_TEXT, CUDA)._replace(head_size=512), "grouped_gemm", "512 features are larger"),
    "double-low-rank": (call("low_rank", TEXT, CUDA)._replace(dtype=torch.float64), "grouped_gemm", "not torch.float64"),
    "convolution-pairs": (call("convolution", device=CUDA, masked=True, hides_pairs=True), "grouped_gemm", "a mask hides pairs"),
    "local_kernel": (call(layout=FAR_TEXT, device=CUDA), "local_kernel", "a CUDA kernel"),
    "local_kernel-insisted": (call(layout=FAR_TEXT, device=CUDA, wish=TRITON), "local_kernel", "a CUDA kernel"),
    "local_kernel-image": (call(layout=FAR_IMAGE, device=CUDA, wish=TRITON), "local_kernel", "a CUDA kernel"),
    "local_kernel-clamped": (call(layout=CLAMPED_IMAGE, device=CUDA, relative="kv"), "local_kernel", "a CUDA kernel"),
    "local_kernel-low-rank": (call("low_rank", FAR_IMAGE, CUDA, masked=True), "local_kernel", "a CUDA kernel"),
    "local_kernel-basis": (call("basis", FAR_TEXT, CUDA), "local_kernel", "a CUDA kernel"),
    "local_kernel-rotated": (call(layout=WIDE_IMAGE, device=CUDA, rotated=True), "local_kernel", "a CUDA kernel"),
    "local-double": (call(layout=FAR_TEXT, device=CUDA)._replace(dtype=torch.float64), "local", "not torch.float64"),
    "local-dropout": (call(layout=FAR_TEXT, device=CUDA, drops=True), "pair_kernels", "CUDA kernels"),
    "shared-dropout": (call(layout=FAR_IMAGE, device=CUDA, drops=True), "grouped_gemm", "far offsets share one matrix"),
    "rotated-text-dropout": (call(layout=FAR_TEXT, device=CUDA, drops=True, rotated=True), "grouped_gemm", "is rotated"),
    "shared-basis-dropout": (call("basis", FAR_IMAGE, CUDA, drops=True), "basis", "dropout"),
    "rotated-dropout": (call(layout=FAR_IMAGE, device=CUDA, drops=True, rotated=True), "reference", "no other path rotates"),
    "step": (call(layout=STEP, device=CUDA, cached=True), "decode", "one new token"),
    "eager": (call(device=CUDA, wish=EAGER), "reference", "eager"),
}  # fmt: skip


@pytest.mark.parametrize("row", ON_A_GPU)
def test_rows_of_the_table_on_a_gpu(row, gpu):
    wanted, path, reason = ON_A_GPU[row]
    choice = choose_path(wanted)
    assert choice.path == path
    assert reason in choice.reason


@pytest.mark.parametrize(("kind", "path"), [("full", "gathered"), ("low_rank", "gathered"), ("basis", "basis")])
def test_an_exported_model_has_plain_operations(kind, path, monkeypatch):
    monkeypatch.setattr(dispatch, "is_exporting", lambda: True)
    assert choose_path(call(kind)).path == path
    assert choose_path(call(kind, TEXT)).path == path
    assert choose_path(call(kind, wish=EAGER)).path == path
    assert choose_path(call("convolution", masked=True, hides_pairs=True)).path == "gathered"
    assert choose_path(call("relative_bias")).path == "reference"
    assert choose_path(call("attention")).path == "sdpa"


@pytest.mark.parametrize("source", ["argument", "variable"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layout": WIDE_IMAGE}, "far offsets share one matrix"),
        ({"layout": FAR_TEXT, "rotated": True, "drops": True}, "what banks project is rotated"),
        ({"kind": "basis", "layout": WIDE_IMAGE}, "far offsets share one matrix"),
    ],
    ids=["shared", "rotated", "shared-basis"],
)
def test_kernels_that_do_not_know_a_layout_are_refused(fields, words, source, gpu):
    if source == "variable":
        gpu.setenv(dispatch.VARIABLE, "1")
    with pytest.raises(ValueError, match=f"cannot be met: {words}"):
        choose_path(call(device=CUDA, wish=TRITON if source == "argument" else AUTO, **fields))


def test_an_older_triton_has_no_kernel_for_near_pairs(gpu):
    triton = pytest.importorskip("triton")
    gpu.delattr(triton.language.constexpr, "__getitem__")
    choice = choose_path(call(layout=FAR_TEXT, device=CUDA))
    assert choice.path == "local"
    assert "needs Triton 3.4" in choice.reason
    assert choose_path(call(layout=FAR_TEXT, device=CUDA, wish=TRITON)).path == "pair_kernels"
    with pytest.raises(ValueError, match="what banks project is rotated"):
        choose_path(call(layout=FAR_TEXT, device=CUDA, wish=TRITON, rotated=True))


@pytest.mark.parametrize(("device", "path"), [(CPU, "grouped"), (CUDA, "grouped_gemm")], ids=["cpu", "gpu"])
def test_a_mask_that_hides_tokens_of_a_wide_window_takes_the_square(device, path, gpu):
    assert choose_path(call(layout=WIDE_IMAGE, device=device, masked=True)).path == path


@pytest.mark.parametrize("layout", [IMAGE, TEXT], ids=["image", "text"])
def test_switched_off_kernels_leave_a_gpu_large_products(layout, gpu):
    gpu.setenv(dispatch.VARIABLE, "0")
    assert choose_path(call(layout=layout, device=CUDA)) == (
        "grouped_gemm",
        "products of many offsets at a time; no CUDA kernel: they are not asked for",
    )


def test_switched_off_others_take_the_place_of_local(monkeypatch):
    monkeypatch.setattr(dispatch, "LOCAL", False)
    assert choose_path(call(layout=FAR_TEXT)).path == "grouped"
    assert choose_path(call(layout=FAR_IMAGE)).path == "streamed"
    assert choose_path(call("low_rank", FAR_IMAGE)).path == "grouped"
    assert choose_path(call("basis", FAR_TEXT)).path == "basis"
    assert choose_path(call(layout=FAR_IMAGE, rotated=True)).path == "reference"
    assert choose_path(call(layout=FAR_TEXT, rotated=True)).path == "grouped"


def test_every_path_of_the_table_is_tested():
    table = Path(dispatch.__file__).read_text().split('"""')[1]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[2])}
    tested = {path for _, path, _ in [*ROWS.values(), *ON_A_GPU.values()]}
    assert named == tested


def test_the_readme_has_the_same_table():
    table = [line for line in Path(dispatch.__file__).read_text().split('"""')[1].splitlines() if line.startswith("|")]
    assert len(table) > 10
    assert "\n".join(table) in (Path(__file__).parent.parent / "modeling" / "README.md").read_text()


# What a model takes


@pytest.mark.parametrize(
    ("modality", "variant", "paths"),
    [
        ("image", "full-kv", ["streamed", "streamed"]),
        ("text", "full-kv", ["streamed", "streamed"]),
        ("text", "lor-qkv", ["grouped", "grouped"]),
        ("image", "basis-qkv", ["basis", "basis"]),
        ("text", "full-clamped", ["local", "local"]),
        ("text", "basis-kv-clamped", ["local", "local"]),
        ("image", "local-shared", ["local", "local"]),
        ("image", "local-rotary", ["local", "local"]),
        ("text", "local-rotary", ["local", "local"]),
        ("image", "acmix", ["sdpa", "conv", "sdpa", "conv"]),
        ("text", "hybrid-full", ["streamed", "streamed", "sdpa", "sdpa"]),
        ("image", "relative-vector", ["products", "products"]),
    ],
)
def test_explain_dispatch(modality, variant, paths):
    model = make_model(modality, variant)
    lines = explain_dispatch(
        model, **make_inputs(model.config), **({"use_cache": False} if modality == "text" else {})
    )
    assert re.findall(r"^layer \d+  \w+  (\w+): .+$", lines, flags=re.MULTILINE) == paths
    assert dispatch._explained is None


@pytest.mark.parametrize("modality", ["image", "text"])
def test_explain_dispatch_tells_what_changes_the_choice(modality):
    model = make_model(modality)
    inputs = make_inputs(model.config)
    mask = torch.ones(2, num_tokens(model.config), dtype=torch.long)
    mask[0, 1] = 0
    assert "mask hides" in explain_dispatch(model, **inputs, attention_mask=mask)
    assert "attention weights" in explain_dispatch(model, **inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    assert "reference: `attn_implementation='eager'`" in explain_dispatch(model, **inputs)


def test_explain_dispatch_of_a_step():
    model = make_model("text")
    cache = StaticCache(config=model.config, max_cache_len=8)
    assert "decode" not in explain_dispatch(model, torch.tensor([[1, 2]]), past_key_values=cache)
    assert "decode: one new token" in explain_dispatch(model, torch.tensor([[3]]), past_key_values=cache)
    told = explain_dispatch(model, torch.tensor([[3]]), past_key_values=cache, output_attentions=True)
    assert "reference: attention weights" in told
    model.set_attn_implementation(EAGER)
    assert "reference: `attn_implementation" in explain_dispatch(model, torch.tensor([[3]]), past_key_values=cache)


@pytest.mark.parametrize("variant", ["attention", "rope", "relative-bias", "convolution", "acmix"])
def test_a_wish_for_kernels_that_no_layer_has_is_refused(variant):
    model = make_model("image", variant)
    with pytest.raises(ValueError, match=r"`attn_implementation='triton'` needs a layer of Translution"):
        model.set_attn_implementation(TRITON)


# Whether the CUDA kernels can serve


def test_a_gpu_takes_the_kernels_by_itself(gpu):
    assert not dispatch.device_obstacle(CUDA, torch.bfloat16, 64)
    assert not dispatch.kernel_obstacle(AUTO, CUDA, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("reason", "arguments", "change"),
    [
        ("are on 'cpu'", (torch.device("cpu"), torch.float32, 64), None),
        ("not torch.float64", (CUDA, torch.float64, 64), None),
        ("larger than 256", (CUDA, torch.float32, 257), None),
        ("Triton is not installed", (CUDA, torch.float32, 64), ("find_spec", lambda name: None)),
        ("compute capability 8.0", (CUDA, torch.bfloat16, 64), (7, 5)),
        ("compute capability 7.0", (CUDA, torch.float16, 64), (6, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_reason_falls_back_with_one_warning_and_refuses_a_wish(gpu, reason, arguments, change):
    if change is not None and isinstance(change[0], str):
        gpu.setattr(dispatch, *change)
    elif change is not None:
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: change)
    warnings = []
    gpu.setattr(dispatch.logger, "warning_once", warnings.append)
    assert reason in dispatch.device_obstacle(*arguments)
    assert reason in dispatch.kernel_obstacle(AUTO, *arguments)
    assert len(warnings) == (arguments[0] == CUDA)
    assert all(reason in warning for warning in warnings)
    with pytest.raises(ValueError, match=r"attn_implementation='triton'.*cannot be met: ") as error:
        dispatch.kernel_obstacle(TRITON, *arguments)
    assert reason in str(error.value)
    gpu.setenv(dispatch.VARIABLE, "1")
    with pytest.raises(ValueError, match="TRANSLUTION_TRITON=1"):
        dispatch.kernel_obstacle(AUTO, *arguments)


def test_an_obstacle_of_the_caller_warns_once(gpu):
    warnings = []
    gpu.setattr(dispatch.logger, "warning_once", warnings.append)
    assert dispatch.kernel_obstacle(AUTO, CUDA, torch.float32, 64, "attention weights are asked for")
    assert warnings == ["Translution runs without its CUDA kernels: attention weights are asked for."]


@pytest.mark.parametrize(("value", "chosen"), [("0", False), ("off", False), ("1", True), ("ON", True), ("auto", True), ("", True)])  # fmt: skip
def test_the_variable(gpu, value, chosen):
    gpu.setenv(dispatch.VARIABLE, value)
    assert (not dispatch.kernel_obstacle(AUTO, CUDA, torch.float32, 64)) is chosen
    assert not dispatch.kernel_obstacle(TRITON, CUDA, torch.float32, 64)


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")], ids=["gpu", "cpu"])
def test_a_basis_asks_once_why_the_kernels_do_not_serve(gpu, device):
    asked = []
    ask = dispatch.device_obstacle
    gpu.setattr(dispatch, "device_obstacle", lambda *arguments: asked.append(arguments) or ask(*arguments))
    gpu.setenv(dispatch.VARIABLE, "0")
    reason = "they are not asked for" if device == CUDA else "the tensors are on 'cpu', and the kernels need a GPU"
    assert choose_path(call("basis", device=device)) == ("basis", f"no CUDA kernel: {reason}")
    assert len(asked) == 1


def test_an_unknown_value_of_the_variable(gpu):
    gpu.setenv(dispatch.VARIABLE, "maybe")
    with pytest.raises(ValueError, match=r"`TRANSLUTION_TRITON` must be 0, 1 or auto, got 'maybe'"):
        dispatch.kernel_obstacle(AUTO, CUDA, torch.float32, 64)


def test_attention_weights_come_from_the_reference_and_not_from_an_explicit_wish(monkeypatch):
    model = TranslutionForImageClassification(make_config("image"))
    pixels = torch.randn(1, 3, 12, 10)
    assert model(pixel_values=pixels, output_attentions=True).attentions[0].shape == (1, 2, 7, 7)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(dispatch.VARIABLE, "1")
    with pytest.raises(ValueError, match="TRANSLUTION_TRITON=1` cannot be met: attention weights are asked for"):
        model(pixel_values=pixels, output_attentions=True)
    monkeypatch.delenv(dispatch.VARIABLE)
    model.set_attn_implementation(TRITON)
    with pytest.raises(ValueError, match="output_attentions"):
        model(pixel_values=pixels, output_attentions=True)
