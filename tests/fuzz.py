"""Random models with random inputs, and what has to hold whatever was drawn.

    python tests/fuzz.py --seed 1 --minutes 5
    python tests/fuzz.py --seed 1 --minutes 5 --checks=-export
    python tests/fuzz.py --seed 1 --case 17 --checks cache

A case is a model in float64 whose weights are wide enough for every path to matter, with inputs and a mask of some form, see
`fuzz_cases.py`. `CHECKS` says what is checked of it. A failure is printed with all that is needed to see it again.

Legend: `B` batch, `A` heads, `L` tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_cases import Case, draw_case, is_packed, packed_texts, visible_pairs
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from translution import TranslutionConfig


# Two ways to add up the same numbers differ by a few roundings, 2e-16 each, and layers of wide weights enlarge that: far less
# than 1e-9, and any mistake is far more. Relative to the largest number, or to 1, the size of what a LayerNorm puts out.
BOUND = 1e-9
SECONDS_PER_CHECK = 120


# What is compared


def assert_close(what: str, actual: Tensor, expected: Tensor):
    """Two tensors differ by at most `BOUND`."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if expected.numel():
        size = max(1.0, expected.abs().max().item())
        difference = (actual - expected).abs().max().item()
        assert difference <= BOUND * size, f"{what}: {difference:.3g} apart, where numbers are up to {size:.3g}"


def hidden_states(case: Case, **inputs: Any) -> Tensor:
    """The final states of every token, `[B, L, C]`."""
    with torch.no_grad():
        return case.model.model(**{**case.inputs, **inputs}).last_hidden_state


def logits(case: Case, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return case.model(**{**case.inputs, **inputs}).logits


def results(model: nn.Module, inputs: dict[str, Any], implementation: str) -> dict[str, Tensor]:
    """Logits, and gradients of a random combination of them by every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    found = model(**inputs).logits
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * weight.to(found.dtype)).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.set_attn_implementation("auto")
    return {"logits": found.detach(), **gradients}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Of the logits and of all gradients, the largest difference relative to the largest number."""
    errors = []
    for names in (["logits"], [name for name in expected if name != "logits"]):
        found, exact = (torch.cat([part[name].double().flatten() for name in names]) for part in (actual, expected))
        size = torch.cat((exact.abs(), torch.ones(1))).max()
        errors.append(torch.cat(((found - exact).abs(), torch.zeros(1))).max().item() / size.item())
    return errors[0], errors[1]


def changed_tokens(case: Case, chosen: Tensor) -> dict[str, Tensor]:
    """The input with other contents of the tokens that `[L]` names."""
    if case.is_text:
        ids = case.inputs["input_ids"]
        return {"input_ids": torch.where(chosen, (ids + 1) % case.config.vocab_size, ids)}
    pixels, (height, width) = case.inputs["pixel_values"], case.config.patch_height_width
    patches = chosen[1:].view(pixels.shape[2] // height, pixels.shape[3] // width)
    places = patches.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return {"pixel_values": torch.where(places, torch.randn_like(pixels), pixels)}


# What is checked


def check_reference(case: Case, rng: random.Random):
    """The default path computes what the readable reference does, and so do its gradients."""
    frozen = rng.choice([0, 0, 0.3, 0.7])
    for parameter in case.model.parameters():
        parameter.requires_grad_(rng.random() >= frozen)
    list(case.model.parameters())[-1].requires_grad_()
    try:
        actual, expected = (results(case.model, case.inputs, name) for name in ("auto", "eager"))
    finally:
        case.model.requires_grad_()
    for what, found in zip(("logits", "gradients"), error(actual, expected), strict=True):
        assert found <= BOUND, f"{what}: {found:.3g} apart, relative to the largest"


def precision_errors(case: Case, dtype: torch.dtype, draw: int = 0) -> list[tuple[float, float]]:
    """Of logits and of gradients, how far the default path and the reference are from float64 in a narrower type.

    `draw` names an experiment: 0 rounds the weights as they are, others after a change of the size of one rounding.
    """
    model = copy.deepcopy(case.model)
    if draw:
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight *= 1 + torch.finfo(dtype).eps * noise
    model = model.to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    # The same weights and inputs, rounded to the type, in float64.
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact = results(copy.deepcopy(model).double(), wide, "eager")
    actual, reference = (error(results(model, inputs, name), exact) for name in ("auto", "eager"))
    return list(zip(actual, reference, strict=True))


def check_precision(case: Case, rng: random.Random):
    """In a narrower type the default path is not much further from float64 than the readable reference in that type.

    Which roundings cancel is chance, and a LayerNorm that divides by little enlarges what is left: one experiment may differ by any
    factor, either way. What exceeds a first bound is therefore drawn again, and most experiments have to be within a tighter one.
    """
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    floor = 16 * torch.finfo(dtype).eps
    first = precision_errors(case, dtype)
    for what, (found, _) in zip(("logits", "gradients"), first, strict=True):
        assert math.isfinite(found), f"{what}: not finite in {dtype}"
    if all(found <= 4 * usual + floor for found, usual in first):
        return
    draws = [precision_errors(case, dtype, draw) for draw in range(1, 50)]
    for what, errors in zip(("logits", "gradients"), zip(*draws, strict=True), strict=True):
        assert all(math.isfinite(found) for found, _ in errors), f"{what}: not finite in {dtype}"
        within = sum(found <= 2 * usual + floor for found, usual in errors)
        assert 2 * within > len(errors), (
            f"{what}: more than twice as far from float64 in {dtype} as the reference in {len(errors) - within} of {len(errors)} "
            "experiments"
        )


def check_causality(case: Case, rng: random.Random):
    """Later tokens change no earlier one."""
    if case.is_text:
        first = rng.randint(1, case.num_tokens)
        changed = changed_tokens(case, torch.arange(case.num_tokens) >= first)
        assert_close(f"logits before {first}", logits(case, **changed)[:, :first], logits(case)[:, :first])


def check_hidden(case: Case, rng: random.Random):
    """A token changes those alone that may read it, directly or through others, one step a layer."""
    chosen = torch.arange(case.num_tokens) == rng.randrange(0 if case.is_text else 1, case.num_tokens)
    reached = chosen.expand(case.batch, -1)
    visible = visible_pairs(case)
    for _ in range(case.config.num_hidden_layers):
        reached = (visible & reached[:, None]).any(dim=-1)
    before, after = hidden_states(case), hidden_states(case, **changed_tokens(case, chosen))
    place = int(chosen.nonzero())
    assert_close(f"states that do not read token {place}", after[~reached], before[~reached])


def check_rows(case: Case, rng: random.Random):
    """Each row of a batch alone gives what it gives among others."""
    together = logits(case)
    for row in range(case.batch):
        alone = {
            name: value[row : row + 1] if isinstance(value, Tensor) and len(value) == case.batch else value
            for name, value in case.inputs.items()
        }
        assert_close(f"logits of row {row}", logits(case, **alone), together[row : row + 1])


def check_cache(case: Case, rng: random.Random):
    """Chunks of a text, then token by token, give what the whole text gives."""
    if not case.is_text or is_packed(case):
        return
    length, slots = case.num_tokens, case.num_tokens + rng.randint(0, 3)
    static = rng.random() < 0.4
    cache = StaticCache(config=case.config, max_cache_len=slots) if static else DynamicCache(config=case.config)
    if rng.random() < 0.2:
        # A cache that was used before and reset is as good as new.
        case.model(case.inputs["input_ids"][:, :1], past_key_values=cache)
        cache.reset()
    place, found, sizes, rows = 0, [], [], torch.arange(case.batch)
    prefill = rng.randint(0, length)
    with torch.set_grad_enabled(rng.random() < 0.3):
        while place < length:
            sizes.append(rng.randint(1, prefill - place) if place < prefill else 1)
            end = place + sizes[-1]
            if place and rng.random() < 0.1:
                # As a beam search does.
                order = torch.randperm(case.batch)
                cache.reorder_cache(order)
                rows = rows[order]
            inputs = {
                name: chunk(name, value[rows] if len(value) == case.batch else value, place, end)
                for name, value in case.inputs.items()
                if isinstance(value, Tensor)
            }
            output = case.model(**inputs, past_key_values=cache, use_cache=True).logits.detach()
            found.append(output[rows.argsort()])
            place = end
    kind = f"static cache of {slots}" if static else "dynamic cache"
    assert_close(f"logits with a {kind} in chunks of {sizes}", torch.cat(found, dim=1), logits(case, use_cache=False))


def chunk(name: str, tensor: Tensor, start: int, end: int) -> Tensor:
    """Of ids and positions those from `start` to `end`; of a mask those queries, and all tokens up to there."""
    if name != "attention_mask":
        return tensor[:, start:end]
    if tensor.ndim == 4 and tensor.shape[2] > 1:
        tensor = tensor[:, :, start:end]
    return tensor[..., :end] if tensor.shape[-1] > 1 else tensor


def check_packed(case: Case, rng: random.Random):
    """Texts packed into one row give what each gives by itself."""
    together = logits(case)
    for row, bounds in enumerate(packed_texts(case)):
        for start, end in bounds:
            positions = case.inputs["position_ids"].expand(case.batch, -1)[row : row + 1, start:end]
            ids = case.inputs["input_ids"][row : row + 1, start:end]
            alone = logits(case, input_ids=ids, position_ids=positions)
            assert_close(
                f"logits of the text at {start} to {end} of row {row}", together[row : row + 1, start:end], alone
            )


def check_resizing(case: Case, rng: random.Random):
    """A model resized for images of another size does what it did for them by interpolation."""
    if not case.is_text:
        resized = copy.deepcopy(case.model)
        resized.model.resize_image(list(case.inputs["pixel_values"].shape[2:]))
        inputs = {**case.inputs, "interpolate_pos_encoding": False}
        with torch.no_grad():
            assert_close("logits", resized(**inputs).logits, logits(case))


def check_saving(case: Case, rng: random.Random):
    """A saved model comes back with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        loaded = type(case.model).from_pretrained(folder, dtype=torch.float64).eval()
    weights = loaded.state_dict()
    for name, weight in case.model.state_dict().items():
        assert torch.equal(weights[name], weight), f"{name} is not what was saved"
    with torch.no_grad():
        assert_close("logits", loaded(**case.inputs).logits, logits(case))


def forget_what_is_cached():
    """Empties the caches of indices, so that an export is the first to ask for them."""
    for name, module in list(sys.modules.items()):
        for function in list(vars(module).values()) if name.startswith("translution.modeling.") else ():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def check_export(case: Case, rng: random.Random):
    """Exporting a model leaves it as it was, and the program gives the same."""
    inputs = {**case.inputs, "use_cache": False} if case.is_text else case.inputs
    before = logits(case, **inputs)
    forget_what_is_cached()
    try:
        program = torch.export.export(case.model, (), inputs, strict=False)
        after = logits(case, **inputs)
    finally:
        # What goes wrong here must not show in other cases.
        forget_what_is_cached()
    assert type(after) is Tensor, f"after an export the model returns a {type(after).__name__}"
    assert_close("logits after an export", after, before)
    assert_close("logits of the exported program", program.module()(**inputs).logits, before)


NOT_COUNTS = (-1, 0, 10**30, math.nan, 1.5, "4", True, [4])
NOT_NUMBERS = (None, -0.5, math.nan, math.inf, "0.5", True, [0.5])
NOT_SIZES = (None, -4, 0, 10**30, math.nan, "8", True, [8], [8, 8, 8], [8, -8], [8, 0], [8, "8"], [8, None], [])
NOT_NAMES = (None, "unknown", "", 3, True, ["unknown"])
INVALID = {
    "modality": NOT_NAMES,
    "mixer_types": (*NOT_NAMES[1:], [], [None], ["attention"] * 9),
    "relative_projections": (*NOT_NAMES, "vk"),
    "far_offsets": NOT_NAMES,
    **dict.fromkeys(("relative_rank", "offset_basis"), NOT_COUNTS),
    "max_relative_distance": [value for value in NOT_COUNTS if value != 0],
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), (None, *NOT_COUNTS)),
    **dict.fromkeys(("head_dim", "intermediate_size", "num_channels", "vocab_size"), (None, *NOT_COUNTS)),
    "max_position_embeddings": (None, *NOT_COUNTS),
    "kernel_size": (None, *NOT_COUNTS, 2, 10**30 + 1),
    "rope_theta": (*NOT_NUMBERS, 0),
    "layer_norm_eps": (*NOT_NUMBERS, 0.0),
    "initializer_range": NOT_NUMBERS[1:],
    **dict.fromkeys(("hidden_dropout_prob", "attention_dropout"), (*NOT_NUMBERS, 1, 10**30)),
    "hidden_act": NOT_NAMES,
    **dict.fromkeys(
        ("use_absolute_position_embeddings", "tie_word_embeddings", "use_cache"), (None, 1, "yes", [True])
    ),
    **dict.fromkeys(("image_size", "patch_size"), NOT_SIZES),
    "pooling": NOT_NAMES,
}


def check_invalid(case: Case, rng: random.Random):
    """A wrong value of a field is refused, when it is given or when a model is made, with a message that names the field."""
    for _ in range(5):
        field_name = rng.choice(
            [name for name in INVALID if case.config.modality == "image" or name not in IMAGE_SIZES]
        )
        value = rng.choice(INVALID[field_name])
        assigned = rng.random() < 0.5
        try:
            if assigned:
                config = copy.deepcopy(case.config)
                setattr(config, field_name, value)
            else:
                config = TranslutionConfig(**{**case.fields, field_name: value})
            type(case.model)(config)
        except (ValueError, TypeError, StrictDataclassError) as refusal:
            if f"`{field_name}`" not in str(refusal) and f"'{field_name}'" not in str(refusal):
                wrong = f"{field_name}={value!r} ({assigned=}) is not named by {first_line(refusal)}"
                raise AssertionError(wrong) from refusal
        except Exception as other:
            raise AssertionError(f"{field_name}={value!r} ({assigned=}): {first_line(other)}") from other
        else:
            raise AssertionError(f"{field_name}={value!r} ({assigned=}) was accepted")


IMAGE_SIZES = ("image_size", "patch_size")
# Each check, and how often it is made.
CHECKS: dict[str, tuple[Callable[[Case, random.Random], None], float]] = {
    "reference": (check_reference, 1),
    "precision": (check_precision, 0.3),
    "causality": (check_causality, 1),
    "hidden": (check_hidden, 1),
    "rows": (check_rows, 1),
    "cache": (check_cache, 1),
    "packed": (check_packed, 1),
    "resizing": (check_resizing, 0.5),
    "saving": (check_saving, 0.03),
    "export": (check_export, 0.05),
    "invalid": (check_invalid, 0.2),
}


# What is run


@dataclass
class Failure:
    seed: int
    number: int
    check: str
    message: str
    description: str = ""

    def __str__(self) -> str:
        again = f"python tests/fuzz.py --seed {self.seed} --case {self.number} --checks {self.check}"
        return f"FAILED {self.check}: {self.message}\n{self.description}\nagain: {again}"


@dataclass
class Summary:
    cases: int = 0
    checks: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what hangs, where the system can."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(seed: int, number: int, checks: list[str], always: bool = False) -> tuple[list[str], list[Failure]]:
    """Draws a case and makes the checks, those that are rare too if `always`; returns which were made, and what failed."""
    made, failures = [], []
    try:
        case = draw_case(seed, number)
    except Exception as problem:
        return [], [Failure(seed, number, "drawing", describe(problem))]
    for name in checks:
        check, share = CHECKS[name]
        rng = random.Random(f"{seed} {number} {name}")
        if rng.random() >= share and not always:
            continue
        made.append(name)
        try:
            # A check draws the same alone as after others.
            torch.manual_seed(rng.getrandbits(60))
            with case.switched(), time_limit(SECONDS_PER_CHECK):
                check(case, rng)
        except Exception as problem:
            case.model.set_attn_implementation("auto")
            failures.append(Failure(seed, number, name, describe(problem), case.describe()))
    return made, failures


def describe(problem: Exception) -> str:
    if isinstance(problem, AssertionError):
        return str(problem)
    return "".join([*traceback.format_tb(problem.__traceback__)[-3:], first_line(problem)])


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def run(seed: int, cases: range, checks: list[str], minutes: float = math.inf, always: bool = False) -> Summary:
    """Runs cases until they, or the minutes, are used up; failures are printed as they come."""
    summary, begin = Summary(), time.monotonic()
    told = begin
    for number in cases:
        if time.monotonic() - begin > 60 * minutes:
            break
        made, failures = run_case(seed, number, checks, always)
        summary.cases += 1
        summary.checks.update(made)
        summary.failures += failures
        for failure in failures:
            print(failure, end="\n\n", flush=True)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            print(f"{told - begin:.0f} s: {summary.cases} cases, {len(summary.failures)} failures", flush=True)
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--case", type=int, help="run this one alone, with every check that is named")
    parser.add_argument(
        "--checks", default="all", help=f"all, or some of {','.join(CHECKS)}; --checks=-NAME leaves one out"
    )
    options = parser.parse_args(arguments)
    names = options.checks.split(",")
    unknown = [name for name in names if name.removeprefix("-") not in ("all", *CHECKS)]
    if unknown:
        parser.error(f"--checks must be all, or some of {', '.join(CHECKS)}, got {', '.join(unknown)}")
    every = all(name == "all" or name.startswith("-") for name in names)
    checks = [name for name in CHECKS if (every or name in names) and f"-{name}" not in names]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    alone = options.case is not None
    cases = range(options.case, options.case + 1) if alone else range(sys.maxsize)
    summary = run(options.seed, cases, checks, options.minutes, always=alone)
    made = ", ".join(f"{count} {name}" for name, count in summary.checks.items())
    print(f"seed {options.seed}: {summary.cases} cases, {len(summary.failures)} failures; checks made: {made}")
    for name, count in Counter(failure.check for failure in summary.failures).items():
        numbers = sorted({failure.number for failure in summary.failures if failure.check == name})
        print(f"  {name}: {count} failures, cases {numbers[:20]}")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
