"""Transformers' pipelines and `Trainer`."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import assert_same, each_modality, greedy, make_inputs, make_model, make_tokenizer
from transformers import Trainer, TrainingArguments, ViTImageProcessor, pipeline


@pytest.mark.parametrize("variant", ["full-kv", "hybrid-lor"])
def test_text_generation_pipeline(tmp_path, variant):
    tokenizer = make_tokenizer()
    model = make_model("text", variant, vocab_size=len(tokenizer), pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = ["the cat", "one dog sat on"]
    together = generator(texts, batch_size=2, **arguments)
    for text, (answer,) in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = tokenizer.decode(greedy(model, ids, 4)[0, ids.shape[1] :], skip_special_tokens=True)
        assert generator(text, **arguments)[0]["generated_text"] == expected
        assert answer["generated_text"] == expected


@pytest.mark.parametrize("variant", ["full-kv", "hybrid-lor"])
def test_image_classification_pipeline(tmp_path, variant):
    names = {0: "cat", 1: "dog", 2: "mat"}
    model = make_model("image", variant, id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 12, "width": 10})
    processor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(2)]
    # The processor is named: Transformers 5.17 finds it by itself only with torchvision.
    classifier = pipeline(
        "image-classification",
        model=str(tmp_path),
        image_processor=ViTImageProcessor.from_pretrained(tmp_path),
        device="cpu",
    )
    answers = classifier(images, top_k=3)
    logits = model(**processor(images, return_tensors="pt")).logits
    for answer, row in zip(answers, logits, strict=True):
        scores = row.softmax(-1)
        assert [entry["label"] for entry in answer] == [names[i] for i in scores.argsort(descending=True).tolist()]
        assert answer[0]["score"] == pytest.approx(scores.max().item(), rel=1e-5)


def make_trainer(modality, folder):
    torch.manual_seed(0)
    model = make_model(modality, "hybrid-lor", torch.float32, attention_dropout=0.1, hidden_dropout_prob=0.1)
    data = [
        {name: value[0] for name, value in make_inputs(model.config, 1).items()}
        | {"labels": torch.tensor(i % 3) if modality == "image" else torch.randint(19, (7,))}
        for i in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])


@each_modality
def test_trainer_resumes_where_it_stopped(tmp_path, modality):
    trainer = make_trainer(modality, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(not torch.equal(before[name], trained[name]) for name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 4
    resumed = make_trainer(modality, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same({name: p.detach() for name, p in resumed.model.named_parameters()}, trained, 1e-7)
