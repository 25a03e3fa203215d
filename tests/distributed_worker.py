"""What each process does in `test_distributed.py`: trains tiny models and saves their losses and final weights.

    accelerate launch --config_file scripts/accelerate/two_cpu_processes.yaml tests/distributed_worker.py OUTPUT_DIR

The tests import this file as well: the one process that the several are compared with has the same models and data.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.append(str(SCRIPTS))
from training.digits import DigitCanvases, digits_split  # noqa: E402
from training.standard_library import read_texts, standard_library_files  # noqa: E402


# A process that waits for another one fails after so many seconds, and all of them end after so many more.
PATIENCE, LIFETIME = 120, 400

BATCH = 8
LEARNING_RATE = 1e-3
# Small enough that it changes every step.
MAX_GRAD_NORM = 0.5
IGNORED = -100

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
}
IMAGE = {**SIZE, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 10}
# 17 positions: rows that two processes cannot share evenly.
TEXT = {**SIZE, "modality": "text", "vocab_size": 256, "max_position_embeddings": 17}

FULL = {"relative_projections": "qkv"}
# Every kind of parameter that a mixer has.
VARIANTS = {
    "full": FULL,
    "lor": {"relative_projections": "qkv", "relative_rank": 4},
    "basis": {"relative_projections": "kv", "offset_basis": 3},
    "lor-basis": {"mixer_types": "rope_translution", "relative_rank": 4, "offset_basis": 3},
    "bounded": {"max_relative_distance": 2},
    "absolute": {"mixer_types": "attention", "use_absolute_position_embeddings": True},
    "relative-bias": {"mixer_types": "relative_bias_attention"},
    "relative-vectors": {"mixer_types": "relative_vector_attention"},
    "convolution": {"mixer_types": "convolution"},
    "acmix": {"mixer_types": "acmix"},
    "hybrid": {"mixer_types": ["rope_attention", "translution"]},
}

LOR = VARIANTS["lor"]
# Models whose heads processes share: modality, whether there is a mask, fields.
TENSOR_PARALLEL = {
    "image-full": ("image", False, FULL),
    "text-full": ("text", True, {"relative_projections": "kv", "tie_word_embeddings": True}),
    "image-local": ("image", False, {"max_relative_distance": 1, "far_offsets": "shared"}),
    "text-local": ("text", True, {"mixer_types": "rope_translution", "max_relative_distance": 3}),
    "image-lor": ("image", True, LOR),
    "text-lor": ("text", True, {**LOR, "relative_projections": "kv"}),
    "image-basis": ("image", True, VARIANTS["basis"]),
    "text-basis": ("text", True, VARIANTS["lor-basis"]),
    "image-bias": ("image", True, VARIANTS["relative-bias"]),
    "text-vectors": ("text", True, VARIANTS["relative-vectors"]),
    "image-convolution": ("image", True, {**VARIANTS["convolution"], "pooling": "mean"}),
    "text-convolution": ("text", True, VARIANTS["convolution"]),
    "text-hybrid": ("text", True, VARIANTS["hybrid"]),
    # The second layer is whole in every process.
    "text-acmix": ("text", True, {"mixer_types": ["translution", "acmix"]}),
}

SHUFFLED = {"train_sampling_strategy": "random", "dataloader_drop_last": True}
# Half a share at a time, and activations computed twice.
IN_HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}


def model_for(modality: str, **fields: Any) -> PreTrainedModel:
    """A model with the same weights in every process."""
    torch.manual_seed(0)
    if modality == "image":
        return TranslutionForImageClassification(TranslutionConfig(**{**IMAGE, **fields}))
    return TranslutionForCausalLM(TranslutionConfig(**{**TEXT, **fields}))


def image_samples(count: int) -> list[dict[str, Tensor]]:
    """Digits at random places."""
    digits, _ = digits_split()
    canvases = DigitCanvases(digits.first(count), "dynamic")
    return [canvases[index] for index in range(count)]


def text_samples(count: int) -> list[dict[str, Tensor]]:
    """Bytes of the standard library, of different lengths, padded; some of their tokens are not to be predicted."""
    length = TEXT["max_position_embeddings"]
    text = next(read_texts(standard_library_files())).encode()
    samples = []
    for index in range(count):
        size = 5 + 7 * index % 12
        ids = torch.tensor(list(text[index * length : (index + 1) * length]))
        mask = (torch.arange(length) < size).long()
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[: index % 3] = IGNORED
        samples.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return samples


def samples_for(modality: str, count: int) -> list[dict[str, Tensor]]:
    return image_samples(count) if modality == "image" else text_samples(count)


def pad_samples(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Fills the last batch with samples whose labels are ignored."""
    blank = {**samples[0], "labels": torch.full_like(samples[0]["labels"], IGNORED)}
    return samples + [blank] * (-len(samples) % BATCH)


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def batches(modality: str, count: int, epochs: int) -> Iterator[dict[str, Tensor]]:
    """Batches for all processes together; the last of an epoch has what is left."""
    samples = samples_for(modality, count)
    for _ in range(epochs):
        for start in range(0, count, BATCH):
            yield stack(samples[start : start + BATCH])


def predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` and what they should say `[N]`: of a text, the token after each one."""
    if labels.ndim == 1:
        return logits, labels
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights in the first process, nothing in the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# Loops of our own


def train_shared(model: nn.Module, modality: str, count: int, epochs: int) -> Tensor:
    """Trains with a share of every batch in each process; returns the loss of each step over all processes.

    Shares may differ, and one may be empty. DDP and FSDP average gradients over the processes, so that a process has to
    divide the sum of its losses by what a process has on average, not by its own count.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    curve = []
    for batch in batches(modality, count, epochs):
        labels = batch["labels"]
        items = (labels if labels.ndim == 1 else labels[:, 1:]).ne(IGNORED).sum()
        share = {name: values[rank::world] for name, values in batch.items()}
        logits, wanted = predictions(model(**{**share, "labels": None}).logits, share["labels"])
        loss = cross_entropy(logits, wanted, reduction="sum") / items * world
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        curve.append(total / world)
    return torch.stack(curve)


def freeze_banks(model: nn.Module) -> None:
    """Leaves what Translution learns per offset as it is."""
    for name, parameter in model.named_parameters():
        if name.endswith("_bank"):
            parameter.requires_grad_(False)


def run_ddp(modality: str, count: int, epochs: int, frozen: bool = False, **fields: Any) -> dict[str, Tensor]:
    model = model_for(modality, **fields).double()
    if frozen:
        freeze_banks(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    losses = train_shared(wrapped, modality, count, epochs)
    return {"losses": losses, **model.state_dict()}


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Shards each layer, and the rest; see `scripts/accelerate/fsdp2.yaml`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def run_fsdp(
    modality: str, count: int, epochs: int, folder: Path, checkpointing: bool = False, **fields: Any
) -> dict[str, Tensor]:
    model = model_for(modality, **fields).double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    shard(model)
    losses = train_shared(model, modality, count, epochs)
    state = full_state(model)
    if PartialState().is_main_process:
        # A copy of the dictionary: saving empties it.
        model.save_pretrained(folder, state_dict=dict(state))
    result = {"losses": losses, **state}
    for name, parameter in model.named_parameters():
        if name.endswith(("_bank", "_coefficients")):
            rows = torch.tensor([parameter.to_local().shape[0]])
            shares = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, rows)
            assert isinstance(parameter, DTensor)
            result[f"rows of {name}"] = torch.cat(shares)
    return result


# Tensor parallelism


def tensor_parallel_inputs(modality: str) -> dict[str, Tensor]:
    """Whole batches: every process has all of them. Texts are padded; images have an additive mask for each head."""
    batch = stack(samples_for(modality, 4))
    if modality == "image":
        torch.manual_seed(1)
        tokens = 1 + (IMAGE["image_size"] // IMAGE["patch_size"]) ** 2
        shape = (4, SIZE["num_attention_heads"], tokens, tokens)
        batch["attention_mask"] = torch.randn(shape, dtype=torch.float64)
    return batch


def logits_and_gradients(model: nn.Module, modality: str, masked: bool = True) -> dict[str, Tensor]:
    batch = tensor_parallel_inputs(modality)
    if not masked:
        del batch["attention_mask"]
    logits = model(**{**batch, "labels": None}).logits
    cross_entropy(*predictions(logits, batch["labels"])).backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), **gradients}


def generated(model: nn.Module, cache: str) -> dict[str, Tensor]:
    """What follows three beginnings of different lengths: tokens, and the logits that they were chosen by."""
    ids = stack(text_samples(3))["input_ids"][:, :5]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {f"{cache} tokens": output.sequences, f"{cache} logits": torch.stack(output.logits)}


def probabilities(model: nn.Module, modality: str) -> dict[str, Tensor]:
    """What the layers attend to, of a batch without masks."""
    batch = tensor_parallel_inputs(modality)
    inputs = {name: values for name, values in batch.items() if name not in ("labels", "attention_mask")}
    found = model(**inputs, output_attentions=True).attentions
    return {f"attention of layer {index}": weights for index, weights in enumerate(found)}


def load_shared(source: PreTrainedModel, folder: Path | None = None) -> PreTrainedModel:
    """A model whose heads the processes share, from files in a folder, or from the weights of `source`, which is quicker."""
    options = {"dtype": torch.float64, "distributed_config": DistributedConfig(tp_plan="auto")}
    if folder is None:
        return type(source).from_pretrained(None, config=source.config, state_dict=source.state_dict(), **options)
    if PartialState().is_main_process:
        source.save_pretrained(folder)
    PartialState().wait_for_everyone()
    return type(source).from_pretrained(folder, **options)


def run_tensor_parallel(
    modality: str, masked: bool = True, folder: Path | None = None, **fields: Any
) -> dict[str, Tensor]:
    """Runs a model whose heads the processes share, and generates with it; with a `folder` it is loaded and saved there."""
    source = model_for(modality, **fields)
    model = load_shared(source, None if folder is None else folder / "whole")
    result = logits_and_gradients(model, modality, masked)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            result[f"gradient of {name}"] = result[f"gradient of {name}"].full_tensor()
            result[f"share of {name}"] = torch.tensor(parameter.to_local().shape)
    with torch.no_grad():
        if modality == "text":
            for cache in ("dynamic", "static"):
                result.update(generated(model, cache))
        if "relative_projections" in fields:
            model.set_attn_implementation("eager")
            result.update(probabilities(model, modality))
    if folder is not None:
        model.save_pretrained(folder / "saved")
    return result


def refusal(**fields: Any) -> dict[str, Tensor]:
    """The bytes of what is said of a model that two processes cannot share."""
    try:
        load_shared(model_for("image", **fields))
    except ValueError as error:
        return {"message": torch.tensor(list(str(error).encode()), dtype=torch.uint8)}
    return {}


# Accelerate's loop


def run_accelerate(count: int, epochs: int, accumulation: int, precision: str = "no") -> dict[str, Tensor]:
    """The loop of Accelerate's manual; half precision and accumulation are only arguments of it."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    model = model_for("image", **FULL)
    if precision == "no":
        model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(image_samples(count), batch_size=BATCH // accelerator.num_processes // accumulation)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    curve = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            curve.append(accelerator.reduce(loss.detach(), "mean"))
    losses = torch.stack(curve).view(-1, accumulation).mean(dim=1)
    return {"losses": losses, **accelerator.unwrap_model(model).state_dict()}


# The Trainer


class RecordingTrainer(Trainer):
    """Remembers the loss of every step over all processes, which the log rounds or averages."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.curve = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.curve.append(self.accelerator.reduce(loss.clone(), "mean"))
        return loss


def sum_of_losses(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """A classifier's loss where processes may have different numbers of labels."""
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def shares_correct(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    return {"accuracy": float((logits.argmax(axis=-1) == labels).mean()), "samples": float(len(labels))}


def trainer(
    folder: Path,
    model: PreTrainedModel,
    samples: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]] | None = None,
    compute_loss_func: Callable | None = None,
    **arguments: Any,
) -> RecordingTrainer:
    """A Trainer in float64 whose processes share a batch of `BATCH`."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": BATCH // PartialState(cpu=True).num_processes,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",
        # The Trainer would look for parameters without a gradient in every step: there are none.
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return RecordingTrainer(
        model.double(),
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=samples,
        eval_dataset=held_out,
        compute_loss_func=compute_loss_func,
        compute_metrics=shares_correct,
    )


def train_and_evaluate(run: RecordingTrainer) -> dict[str, Tensor]:
    run.train()
    result = {"losses": torch.stack(run.curve), **run.model.state_dict()}
    if run.eval_dataset is not None:
        metrics = run.evaluate()
        values = [metrics["eval_accuracy"], metrics["eval_samples"]]
        result["metrics"] = torch.tensor(values, dtype=torch.float64)
    return result


def cases(folder: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Everything that several processes do, by name. 25 = 3 · 8 + 1: of the last batch one process gets nothing."""
    found = {
        "ddp-image": lambda: run_ddp("image", 25, 3, **FULL),
        "ddp-text": lambda: run_ddp("text", 29, 3, **FULL),
        "ddp-frozen": lambda: run_ddp("image", 25, 3, frozen=True, **FULL),
        "fsdp-image": lambda: run_fsdp("image", 25, 3, folder / "fsdp-image", **FULL),
        "fsdp-text": lambda: run_fsdp("text", 29, 3, folder / "fsdp-text", True, tie_word_embeddings=True, **FULL),
        "fsdp-basis": lambda: run_fsdp("text", 16, 2, folder / "fsdp-basis", **VARIANTS["lor-basis"]),
        "accelerate": lambda: run_accelerate(32, 2, accumulation=2),
        "accelerate-bf16": lambda: run_accelerate(32, 2, accumulation=1, precision="bf16"),
    }
    trainers = {
        "trainer-image": ("image", image_samples(29), {"held_out": image_samples(13)}),
        "trainer-image-exact": ("image", pad_samples(image_samples(29)), {"compute_loss_func": sum_of_losses}),
        "trainer-image-shuffled": ("image", image_samples(29), SHUFFLED),
        "trainer-text": ("text", pad_samples(text_samples(29)), {}),
        "trainer-text-halves": ("text", text_samples(32), IN_HALVES),
    }
    for name, (modality, samples, arguments) in trainers.items():
        found[name] = lambda m=modality, s=samples, a=arguments: train_and_evaluate(
            trainer(folder, model_for(m, **FULL), s, **a)
        )
    for name, (modality, masked, fields) in TENSOR_PARALLEL.items():
        files = folder / f"heads-{name}" if name == "text-full" else None
        found[f"heads-{name}"] = lambda m=modality, w=masked, d=files, f=fields: run_tensor_parallel(m, w, d, **f)
    found["heads-refused"] = lambda: refusal(num_attention_heads=3)
    for name, fields in VARIANTS.items():
        for modality in ("image", "text"):
            # Two steps: DDP complains in the second about parameters that got no gradient in the first.
            found[f"step-{modality}-{name}"] = lambda m=modality, f=fields: run_ddp(m, 16, 1, **f)
    return found


def main(output_dir: str):
    # No process waits for ever.
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    torch.set_num_threads(1)
    state = PartialState(cpu=True, timeout=timedelta(seconds=PATIENCE))
    folder = Path(output_dir)
    for name, run in cases(folder).items():
        result = run()
        if state.is_main_process:
            # Tied weights share their memory, which safetensors refuses.
            tensors = {key: value.contiguous().clone() for key, value in result.items()}
            save_file(tensors, folder / f"{name}.safetensors")
        state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
