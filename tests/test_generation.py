"""Generation with a cache: every decoding mode against the same without one, in float64; the cache itself."""

import copy
import itertools

import pytest
import torch
from small_models import make_tokenizer
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from translution import TranslutionConfig, TranslutionForCausalLM
from translution.configuration.configuration_translution import MIXER_TYPES
from translution.modeling.mixers.cache import TranslutionDynamicLayer


SUBSETS = ["qkv", "qk", "qv", "kv", "q", "k", "v"]
HIDDEN, HEADS, HEAD_DIM, RANK, LAYERS, BANK = 12, 3, 4, 2, 2, 40
INNER = HEADS * HEAD_DIM

VARIANTS = {
    name: {"mixer_types": name, "relative_rank": RANK if name == "rope_translution" else None} for name in MIXER_TYPES
}
VARIANTS["absolute"] = {"mixer_types": "attention", "use_absolute_position_embeddings": True}
VARIANTS["hybrid"] = {"num_hidden_layers": 8, "mixer_types": list(MIXER_TYPES), "relative_rank": RANK}
VARIANTS |= {
    f"rotary-{subset}-D{distance}": {
        "mixer_types": "rope_translution",
        "relative_projections": subset,
        "max_relative_distance": distance,
    }
    for subset, distance in (("kv", 3), ("qkv", 2), ("q", 1), ("k", 0))
}
VARIANTS["hybrid-convolution-first"] = {"mixer_types": ["convolution", "translution"]}
for form, fields in {
    "full": {},
    "lor": {"relative_rank": RANK},
    "basis": {"offset_basis": 2},
    "basis-lor": {"offset_basis": 2, "relative_rank": RANK},
}.items():
    VARIANTS |= {f"{form}-{subset}": {"relative_projections": subset, **fields} for subset in SUBSETS}
    VARIANTS |= {
        f"{form}-{subset}-D{distance}": {"relative_projections": subset, "max_relative_distance": distance, **fields}
        for subset, distance in (("qkv", 3), ("kv", 2), ("qv", 1), ("k", 0))
    }
FEW = [
    "rope_attention",
    "convolution",
    "acmix",
    "hybrid",
    "full-qkv",
    "full-v",
    "lor-kv",
    "basis-qkv",
    "full-kv-D2",
    "lor-qkv-D3",
    "rotary-kv-D3",
]

each_variant = pytest.mark.parametrize("variant", list(VARIANTS))
few_variants = pytest.mark.parametrize("variant", FEW)


def make_model(variant, **fields):
    values = {
        "modality": "text",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 20,
        # Wide enough for the most likely token to be far from the next.
        "initializer_range": 0.5,
        "vocab_size": 19,
        "max_position_embeddings": BANK,
        "pad_token_id": 0,
    }
    return TranslutionForCausalLM(TranslutionConfig(**{**values, **VARIANTS[variant], **fields})).double().eval()


def make_prompts(batch=2, length=6):
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(1, 19, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row + 1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, use_cache=True, **options):
    torch.manual_seed(1)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**inputs, use_cache=use_cache, **options)


def assert_same_as_without_cache(model, inputs, **options):
    expected = generate(model, inputs, use_cache=False, **options)
    assert torch.equal(generate(model, inputs, **options), expected)
    return expected


# Steps


def logits_in_steps(model, inputs, cache, sizes):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits, place = [], 0
    for size in sizes:
        end = place + size
        output = model(ids[:, place:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        assert int(cache.get_seq_length()) == end
        logits.append(output.logits)
        place = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@each_variant
def test_every_step_equals_the_full_forward(variant, static):
    model = make_model(variant)
    # Beyond the bank where there is a distance.
    length = 14 if model.config.max_relative_distance is None else BANK + 5
    length = 14 if model.config.use_absolute_position_embeddings else length
    inputs = make_prompts(length=length)
    expected = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    for sizes in ([1] * length, [5] + [1] * (length - 5), [4, 3, 1, length - 8]):
        cache = StaticCache(model.config, max_cache_len=length + 3) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            logits = logits_in_steps(model, inputs, cache, sizes)
        assert (logits - expected)[real].abs().max().item() < 1e-10, sizes


@each_variant
def test_steps_of_an_empty_batch(variant):
    model = make_model(variant)
    inputs = {name: tensor[:0] for name, tensor in make_prompts(length=6).items()}
    with torch.no_grad():
        assert logits_in_steps(model, inputs, DynamicCache(config=model.config), [3, 1, 1, 1]).shape == (0, 6, 19)


def test_every_length_up_to_the_bank():
    for variant in ("full-qkv", "lor-qkv", "basis-kv"):
        model = make_model(variant, max_position_embeddings=9)
        inputs = make_prompts(length=9)
        expected = model(**inputs, use_cache=False).logits
        logits = logits_in_steps(model, inputs, DynamicCache(config=model.config), [1] * 9)
        assert (logits - expected)[inputs["attention_mask"].bool()].abs().max().item() < 1e-10
        with pytest.raises(ValueError, match="at most `max_position_embeddings` 9 tokens, got 10"):
            model.generate(**inputs, max_new_tokens=3)


@few_variants
def test_eager_steps_and_weights(variant):
    model = make_model(variant)
    inputs = make_prompts(length=9)
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("eager")
    logits = logits_in_steps(model, inputs, DynamicCache(config=model.config), [4, 1, 1, 3])
    assert (logits - expected)[inputs["attention_mask"].bool()].abs().max().item() < 1e-10
    output = generate(model, inputs, output_attentions=True, return_dict_in_generate=True, max_new_tokens=3)
    for layer in output.attentions[-1]:
        assert layer.shape == (2, HEADS, 1, 11)
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, HEADS, 1, dtype=torch.float64))


@few_variants
def test_gradients_through_a_cache(variant):
    """A prefix may be kept with its graph: the gradient through a cache is that of the whole text."""
    model = make_model(variant)
    inputs = make_prompts(length=8)
    real = inputs["attention_mask"].bool()
    gradients = []
    for cache, sizes in ((None, [8]), (DynamicCache(config=model.config), [5, 1, 2])):
        model.zero_grad()
        if cache is None:
            logits = model(**inputs, use_cache=False).logits
        else:
            logits = logits_in_steps(model, inputs, cache, sizes)
        logits[real].sin().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


# Decoding modes


@each_variant
def test_greedy(variant):
    assert_same_as_without_cache(make_model(variant), make_prompts())


@each_variant
def test_static(variant):
    model, inputs = make_model(variant), make_prompts()
    expected = generate(model, inputs, use_cache=False)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, inputs, **options), expected)
    assert torch.equal(generate(model, inputs, num_beams=2, **options), generate(model, inputs, False, num_beams=2))


@each_variant
def test_beams_and_samples(variant):
    model, inputs = make_model(variant), make_prompts()
    assert_same_as_without_cache(model, inputs, num_beams=3, num_return_sequences=2)
    assert_same_as_without_cache(model, inputs, do_sample=True, temperature=1.5, top_k=7)
    assert_same_as_without_cache(model, inputs, do_sample=True, num_return_sequences=2, repetition_penalty=1.2)


@each_variant
def test_a_batch_of_prompts_equals_each_alone(variant):
    model, inputs = make_model(variant), make_prompts(batch=3)
    together = generate(model, inputs)[:, 6:]
    for row in range(3):
        alone = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        assert torch.equal(generate(model, {"input_ids": alone})[0, alone.shape[1] :], together[row])


@each_variant
def test_speculation(variant):
    """Decoding modes that take tokens back."""
    model = make_model(variant)
    prompt = {"input_ids": torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])}
    expected = generate(model, prompt, use_cache=False)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3), expected)
    # A copy that is a little off is right now and then, and wrong now and then.
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += 0.15 * torch.randn_like(assistant.lm_head.weight)
    assert torch.equal(generate(model, prompt, assistant_model=assistant), expected)


def test_another_translution_model_assists():
    model, assistant = make_model("full-kv"), make_model("lor-kv-D2", num_hidden_layers=1)
    assert_prompt = {"input_ids": torch.tensor([[3, 4, 5, 6, 3]])}
    expected = generate(model, assert_prompt, use_cache=False)
    assert torch.equal(generate(model, assert_prompt, assistant_model=assistant), expected)


@few_variants
def test_prefill_in_chunks(variant):
    model, inputs = make_model(variant), make_prompts(length=9)
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, prefill_chunk_size=4), expected)


@few_variants
def test_inputs_embeds(variant):
    model, inputs = make_model(variant), make_prompts()
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    assert torch.equal(generate(model, embeds), generate(model, inputs)[:, 6:])


@few_variants
def test_several_turns(variant):
    model = make_model(variant)
    cache, ids = DynamicCache(config=model.config), torch.randint(1, 19, (1, 4))
    for _ in range(3):
        expected = generate(model, {"input_ids": ids}, use_cache=False, max_new_tokens=4)
        ids = generate(model, {"input_ids": ids}, past_key_values=cache, max_new_tokens=4)
        assert torch.equal(ids, expected)
        ids = torch.cat((ids, torch.randint(1, 19, (1, 3))), dim=1)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "-D" in name])
def test_beyond_the_bank(variant):
    model, inputs = make_model(variant), make_prompts(length=BANK - 3)
    assert assert_same_as_without_cache(model, inputs, max_new_tokens=9).shape[1] == BANK + 6


@pytest.mark.parametrize("variant", ["full-qkv", "lor-kv", "basis-qkv", "full-kv-D2", "rotary-kv-D3", "hybrid"])
def test_compiled_static_step(variant):
    """One graph without breaks serves every step."""
    model, inputs = make_model(variant), make_prompts()
    expected = generate(model, inputs, use_cache=False)
    compiled = make_model(variant)
    compiled.load_state_dict(model.state_dict())
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(model.config, max_cache_len=20)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for _ in range(8):
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
            full = torch.zeros(2, 20, dtype=mask.dtype)
            full[:, : mask.shape[1]] = mask
            positions = (mask.cumsum(-1) - 1)[:, -1:]
            logits = compiled(
                ids[:, -1:], attention_mask=full, past_key_values=cache, position_ids=positions, use_cache=True
            ).logits
    assert torch.equal(ids, expected)


def test_streaming_and_pipeline():
    from transformers import pipeline

    tokenizer = make_tokenizer()
    model = make_model("full-kv", vocab_size=len(tokenizer))
    tokenizer.padding_side = "left"
    prompts = ["the cat sat", "one dog", "on a mat far away"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    singles = [generator(prompt, max_new_tokens=8, do_sample=False, use_cache=False) for prompt in prompts]
    assert generator(prompts, batch_size=3, max_new_tokens=8, do_sample=False) == singles
    expected = generate(model, dict(tokenizer(prompts[0], return_tensors="pt")), use_cache=False)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    generate(model, dict(tokenizer(prompts[0], return_tensors="pt")), streamer=streamer)
    # The word-level tokenizer of this test puts its spaces by what it decodes at once.
    assert "".join(streamer).split() == tokenizer.decode(expected[0], skip_special_tokens=True).split()


class EndsWith(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_what_transformers_models_do():
    tokenizer = make_tokenizer()
    model = make_model("full-qkv", vocab_size=len(tokenizer))
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    expected = generate(model, inputs, use_cache=False)
    # Scores and logits of each step.
    output = generate(model, inputs, output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert len(output.scores) == len(output.logits) == 8
    logits = model(expected, use_cache=False).logits[:, 2:-1]
    # Transformers hands them out in float32.
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits.float(), rtol=1e-5, atol=1e-5)
    # An end token, a stop string and a generation config end or shape the text.
    end = expected[0, 5].item()
    ended = generate(model, inputs, eos_token_id=end)[0].tolist()
    first = expected[0, 3:].tolist().index(end)
    assert ended == expected[0, : 4 + first].tolist()
    stopped = generate(model, inputs, stopping_criteria=StoppingCriteriaList([EndsWith(end)]))
    assert stopped[0].tolist() == ended
    model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**inputs), expected[:, :5])
    # A larger vocabulary keeps the old logits; a tied head follows its embedding.
    model.resize_token_embeddings(len(tokenizer) + 4)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(tokenizer) + 4
    longer = model(expected, use_cache=False).logits[:, 2:-1, : len(tokenizer)]
    torch.testing.assert_close(longer, logits, rtol=1e-12, atol=1e-12)
    tied = make_model("full-kv", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert_same_as_without_cache(tied, make_prompts())


def test_caches_that_cannot_work():
    model, inputs = make_model("full-kv"), make_prompts()
    with pytest.raises((ValueError, ImportError), match=r"translution|quant"):
        generate(model, inputs, cache_implementation="quantized", cache_config={"backend": "quanto"})
    with pytest.raises((ValueError, ImportError), match=r"translution|quant"):
        QuantizedCache("quanto", model.config)
    with pytest.raises(ValueError, match=r"`generate_batch` .* not .* Translution .* `generate`"):
        model.generate_batch([[1, 2, 3]])


# The cache


def elements_per_token(config, mixer):
    """What a layer remembers of each token, by the table in `modeling/mixers/cache.py`."""
    hidden, inner, rank = config.hidden_size, INNER, HEADS * (config.relative_rank or 0)
    relative = config.relative_projections
    scores, values = "q" in relative or "k" in relative, "v" in relative
    if mixer == "convolution":
        return 0
    if mixer not in ("translution", "rope_translution"):
        return 2 * inner
    if config.relative_rank is not None:
        return 2 * inner + rank * (scores + values)
    if config.max_relative_distance is not None:
        return 2 * inner
    return hidden * ("k" in relative or values) + inner * ("k" not in relative) + inner * (not values)


def recent_elements(config, mixer):
    """What it remembers of the last tokens alone, in all."""
    hidden, rank = config.hidden_size, HEADS * (config.relative_rank or 0)
    relative, distance = config.relative_projections, config.max_relative_distance
    scores, values = "q" in relative or "k" in relative, "v" in relative
    if mixer == "convolution":
        return (config.kernel_size - 1) * hidden
    if mixer == "acmix":
        return (config.kernel_size - 1) * HEAD_DIM * config.kernel_size
    if mixer not in ("translution", "rope_translution") or not distance:
        return 0
    if config.relative_rank is not None:
        return (distance - 1) * rank * (scores + values)
    key = 0 if not scores else hidden if "k" in relative else INNER
    # A cosine and a sine for each feature of a head, where projections are rotated.
    turns = 2 * HEAD_DIM if mixer == "rope_translution" and scores else 0
    return (distance - 1) * (turns + (hidden if "k" in relative and values else key + hidden * values))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@each_variant
def test_bytes(variant, static):
    model = make_model(variant)
    length, slots = 13, 17
    cache = StaticCache(model.config, max_cache_len=slots) if static else DynamicCache(config=model.config)
    ids = torch.randint(1, 19, (3, length))
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        for place in range(8, length):
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    for layer, mixer in zip(cache.layers, model.config.mixer_types, strict=True):
        tokens = slots if static else length
        kept = layer.keys.numel() + layer.values.numel() + (0 if layer.recent is None else layer.recent.numel())
        assert kept == 3 * (tokens * elements_per_token(model.config, mixer) + recent_elements(model.config, mixer))


def filled(variant, length=9, batch=2, **fields):
    model = make_model(variant, **fields)
    cache = DynamicCache(config=model.config)
    ids = torch.randint(1, 19, (batch, length))
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return model, cache, ids


def continued(model, cache, ids, token):
    """Logits of one more token after a cache, and after the text itself."""
    with torch.no_grad():
        expected = model(torch.cat((ids, token), dim=1), use_cache=False).logits[:, -1:]
        return model(token, past_key_values=cache, use_cache=True).logits, expected


def assert_continues(model, cache, ids):
    token = torch.randint(1, 19, (len(ids), 1))
    actual, expected = continued(model, cache, ids, token)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@few_variants
def test_cache_operations(variant):
    model, cache, ids = filled(variant)
    assert all(isinstance(layer, TranslutionDynamicLayer) for layer in cache.layers)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_continues(model, copy.deepcopy(cache), ids.flip(0))
    cache.batch_repeat_interleave(2)
    assert_continues(model, copy.deepcopy(cache), ids.flip(0).repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert_continues(model, copy.deepcopy(cache), ids.flip(0))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_continues(model, cache, ids.flip(0))
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert_continues(model, cache, ids)


@few_variants
def test_crop(variant):
    model = make_model(variant)
    cache, ids = DynamicCache(config=model.config), torch.randint(1, 19, (2, 9))
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        assert cache.get_seq_length() == 6
        model(ids[:, :2], past_key_values=cache, use_cache=True)
        cache.crop(-1)
    assert_continues(model, cache, torch.cat((ids[:, :6], ids[:, :1]), dim=1))


def test_crop_without_recording_says_so():
    _, cache, _ = filled("convolution")
    with pytest.raises(RuntimeError, match=r"cannot take back 2 tokens.*`activate_past_recording`"):
        cache.crop(-2)


def test_every_pair_of_mixers_generates():
    for first, second in itertools.combinations(MIXER_TYPES, 2):
        fields = {"mixer_types": [first, second], "relative_rank": RANK}
        assert_same_as_without_cache(
            make_model("hybrid", num_hidden_layers=2, **fields), make_prompts(), max_new_tokens=4
        )


def test_a_training_step_remembers_nothing():
    model, inputs = make_model("hybrid"), make_prompts()
    assert model.train()(**inputs).past_key_values is None
    assert model.eval()(**inputs).past_key_values.get_seq_length() == 6
    assert model(**inputs, use_cache=False).past_key_values is None


def test_states_that_were_handed_out_stay():
    """New tokens are written into room that is left; what was read before is not written over, not even after a crop."""
    model, cache, ids = filled("rope_attention")
    before, copied = cache.layers[0].keys, cache.layers[0].keys.clone()
    with torch.no_grad():
        model(ids[:, :2], past_key_values=cache, use_cache=True)
        assert torch.equal(before, copied)
        longer, kept = cache.layers[0].keys, cache.layers[0].keys.clone()
        cache.crop(-2)
        model(ids[:, 4:6], past_key_values=cache, use_cache=True)
    assert torch.equal(before, copied)
    assert torch.equal(longer, kept)


@few_variants
def test_own_compile_of_generate(variant):
    """What `generate` does by itself with a static cache on an accelerator, on prompts that are padded."""
    torch._dynamo.reset()  # graphs of other models count towards the limit
    model, inputs = make_model(variant), make_prompts()
    expected = generate(model, inputs, use_cache=False, max_new_tokens=5)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config, "max_new_tokens": 5}
    assert torch.equal(generate(model, inputs, **options), expected)


def test_own_compile_does_not_outgrow_the_bank():
    model = make_model("full-kv", max_position_embeddings=9)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True
    with pytest.raises(ValueError, match="at most `max_position_embeddings` 9 tokens, got 10"):
        generate(model, make_prompts(), cache_implementation="static", compile_config=compile_config)


def test_a_model_assists_itself():
    model = make_model("full-kv", num_hidden_layers=3)
    prompt = {"input_ids": torch.tensor([[3, 4, 5, 6, 3]])}
    assert torch.equal(generate(model, prompt, assistant_early_exit=1), generate(model, prompt, use_cache=False))


@few_variants
def test_branches_of_a_prefix(variant):
    """Two texts go on from one cache, its layers copied but not their tensors."""
    model, cache, ids = filled(variant)
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    one, other = torch.randint(1, 19, (2, 2, 1))
    with torch.no_grad():
        model(one, past_key_values=cache, use_cache=True)
        model(other, past_key_values=branch, use_cache=True)
    assert_continues(model, cache, torch.cat((ids, one), dim=1))
    assert_continues(model, branch, torch.cat((ids, other), dim=1))


@few_variants
def test_a_cache_of_another_batch_is_refused(variant):
    model, cache, ids = filled(variant)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        model(ids[:1, :1], past_key_values=cache, use_cache=True)


def test_positions_of_a_static_cache():
    """A mask may be as wide as the cache: positions count what is filled."""
    for variant in ("rope_attention", "absolute"):
        model, inputs = make_model(variant), make_prompts(length=7)
        expected = model(**inputs, use_cache=False).logits
        cache = StaticCache(model.config, max_cache_len=12)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5))
        with torch.no_grad():
            logits = model(inputs["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True).logits
        assert (logits - expected)[inputs["attention_mask"].bool()].abs().max().item() < 1e-10


def test_crop_where_nothing_recent_is_needed():
    for variant in ("full-qv-D1", "convolution"):
        model, cache, ids = filled(variant) if variant != "convolution" else filled(variant, kernel_size=1)
        cache.crop(-3)
        assert_continues(model, cache, ids[:, :6])


def test_autocast_keeps_one_input_for_two_banks():
    model = make_model("full-kv").float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.randint(1, 19, (2, 5)), use_cache=True).past_key_values
    assert sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) == LAYERS * 2 * 5 * HIDDEN
