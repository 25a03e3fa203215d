"""Models that are saved, loaded, copied, and loaded with other fields."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from closeness import assert_close_in_rounding
from huggingface_hub.errors import StrictDataclassError
from small_models import AUTO, HEADS, assert_same, each_modality, each_variant, make_config, make_inputs, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from translution import TranslutionForImageClassification, TranslutionModel


# Saving and copying


@each_modality
@each_variant
def test_save_and_load(tmp_path, modality, variant):
    model = make_model(modality, variant)
    inputs = make_inputs(model.config)
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    for load in (HEADS[modality].from_pretrained, AUTO[modality].from_pretrained):
        loaded, report = load(tmp_path, output_loading_info=True)
        assert type(loaded) is HEADS[modality]
        assert not any(report.values()), report
        weights = loaded.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert_close_in_rounding(loaded(**inputs).logits, expected)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is TranslutionModel
    assert_close_in_rounding(trunk(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@each_modality
def test_load_in_another_precision(tmp_path, modality):
    model = make_model(modality, "hybrid-lor", torch.float32)
    model.save_pretrained(tmp_path)
    inputs = make_inputs(model.config)
    loaded = AUTO[modality].from_pretrained(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert_same(loaded(**inputs).logits, model.double()(**inputs).logits)


@each_modality
def test_trunk_into_a_head(tmp_path, modality):
    trunk = make_model(modality, "hybrid-full", head=False)
    trunk.save_pretrained(tmp_path)
    model = HEADS[modality].from_pretrained(tmp_path)
    inputs = make_inputs(model.config)
    assert_close_in_rounding(model.model(**inputs).last_hidden_state, trunk(**inputs).last_hidden_state)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


FRESH_PROCESS = """
import sys
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import translution
import unaligned
from closeness import assert_close_in_rounding
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
unaligned.follow_switch()
for task, auto in {"image": AutoModelForImageClassification, "text": AutoModelForCausalLM}.items():
    inputs, logits, hidden = torch.load(f"{folder}/{task}.pt")
    assert_close_in_rounding(auto.from_pretrained(f"{folder}/{task}")(**inputs).logits, logits)
    assert_close_in_rounding(AutoModel.from_pretrained(f"{folder}/{task}")(**inputs).last_hidden_state, hidden)
print("equal")
"""


def test_load_in_a_fresh_process(tmp_path):
    for modality in HEADS:
        model = make_model(modality, "hybrid-lor")
        inputs = make_inputs(model.config)
        model.save_pretrained(tmp_path / modality)
        with torch.no_grad():
            outputs = inputs, model(**inputs).logits, model.model(**inputs).last_hidden_state
        torch.save(outputs, tmp_path / f"{modality}.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), os.path.dirname(__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@each_modality
def test_copy_and_pickle(modality):
    model = make_model(modality, "hybrid-lor")
    inputs = make_inputs(model.config)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "auto"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close_in_rounding(other(**inputs).logits, expected)
        assert other.config.to_dict() == model.config.to_dict()
    torch.nn.init.zeros_(next(twin.parameters()))
    assert_close_in_rounding(model(**inputs).logits, expected)


# What is set on a config after it was checked


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"relative_projections": "xyz"}, ("`relative_projections`", "'xyz'", "'qkv'")),
        ({"num_hidden_layers": 4}, ("`mixer_types`", "`num_hidden_layers` is 4", "got 2 names")),
        ({"num_hidden_layers": 1}, ("`mixer_types`", "`num_hidden_layers` is 1", "got 2 names")),
        ({"relative_rank": 0}, ("`relative_rank`", "got 0", "at least 1")),
        ({"image_size": [13, 10]}, ("`image_size`", "[13, 10]", "`patch_size`")),
    ],
    ids=lambda value: str(value)[:24],
)
def test_overrides_of_from_pretrained_are_checked(override, words, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError) as caught:
        TranslutionForImageClassification.from_pretrained(tmp_path, **override)
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_mixer_name_is_the_default():
    config = make_config(mixer_types="attention")
    config.mixer_types = None
    model = TranslutionForImageClassification(config)
    assert model.config.mixer_types == ["translution"] * 2
    model.config.mixer_types = None
    assert model(**make_inputs(model.config)).logits.isfinite().all()
    model.config.validate()
    assert model.config.mixer_types == ["translution"] * 2


def test_one_mixer_name_overrides_all(tmp_path):
    make_model(variant="attention").save_pretrained(tmp_path)
    model = TranslutionForImageClassification.from_pretrained(tmp_path, mixer_types="rope_attention", head_dim=8)
    assert model.config.mixer_types == ["rope_attention"] * 2


def test_a_tokenizer_beside_a_model_warns_of_nothing(tmp_path, caplog):
    make_model("text", "hybrid-lor").save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [0]
    finally:
        logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
