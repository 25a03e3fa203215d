"""Trains an image classifier, new or from a checkpoint.

    python scripts/run_image_classification.py scripts/recipes/digits.yaml --output_dir runs/digits
    python scripts/run_image_classification.py --train_dir pictures --image_size 32 --patch_size 8 --output_dir runs/pictures

A folder of pictures has one folder for each class. A run that is stopped goes on when it is called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.command import run_command
from datasets import IterableDataset
from training.arguments import ModelArguments, RunArguments, new_config, parse_arguments, refuse_new_model_options
from training.augmentation import AugmentationArguments, ImageBatch, ImageSamples, ImageStream, ImageTransform
from training.data_arguments import ImageDataArguments
from training.image_data import load_images
from training.metrics import image_metrics, likeliest_classes
from training.run import Run
from training.splits import AnyDataset
from training.trainer import ImageTrainer, ScriptTrainingArguments
from training.weights import load_checkpoint
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel
from transformers import ViTImageProcessorPil as ImageProcessor

from translution import TranslutionForImageClassification


@dataclass
class ImageArguments:
    """The shape of the pictures."""

    image_size: int | None = field(default=None, metadata={"help": "Pixels; pictures are resized to it."})
    patch_size: int | None = field(default=None, metadata={"help": "Pixels of a token, of a new model."})
    image_mean: list[float] = field(default_factory=lambda: [0.5] * 3, metadata={"help": "Mean of each channel."})
    image_std: list[float] = field(default_factory=lambda: [0.5] * 3, metadata={"help": "Deviation of each channel."})


def load_model(
    args: ModelArguments, image: ImageArguments, names: list[str]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model whose classes are `names`, and what makes its inputs.

    Raises:
        ValueError: for options that contradict each other, the config, or the checkpoint.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if args.model_name_or_path is None:
        asked = {"image_size": image.image_size, "patch_size": image.patch_size}
        config = new_config(args, {"modality": "image", **labels}, asked)
        if config.num_channels != 3:
            raise ValueError(f"`num_channels` must be 3, pictures are read as RGB, got {config.num_channels}.")
        height, width = config.image_height_width
        processor = ImageProcessor(
            size={"height": height, "width": width},
            do_convert_rgb=True,
            image_mean=image.image_mean,
            image_std=image.image_std,
        )
        return TranslutionForImageClassification(config), processor
    refuse_new_model_options(args)
    model = load_checkpoint(AutoModelForImageClassification, args, **labels)
    processor = AutoImageProcessor.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision or "main",
        trust_remote_code=args.trust_remote_code,
    )
    if image.patch_size is not None and image.patch_size != model.config.patch_size:
        raise ValueError(f"`patch_size` must be the checkpoint's {model.config.patch_size}, got {image.patch_size}.")
    if image.image_size is not None and image.image_size != model.config.image_size:
        model.model.resize_image([image.image_size, image.image_size])
        processor.size = {"height": image.image_size, "width": image.image_size}
    return model, processor


def samples(data: AnyDataset | None, transform: ImageTransform, seed: int | None) -> ImageSamples | ImageStream | None:
    if data is None:
        return None
    return (ImageStream if isinstance(data, IterableDataset) else ImageSamples)(data, transform, seed)


def main(arguments: Sequence[str]):
    classes = (
        ModelArguments,
        ImageArguments,
        ImageDataArguments,
        AugmentationArguments,
        ScriptTrainingArguments,
        RunArguments,
    )
    model_args, image_args, data_args, augmentation, training, run_args = parse_arguments(
        classes, arguments, __doc__.splitlines()[0]
    )
    run = Run(
        script="run_image_classification.py",
        task="image-classification",
        arguments=list(arguments),
        model=model_args,
        data=data_args,
        training=training,
        run=run_args,
        others=(image_args, augmentation),
    )
    with training.main_process_first(desc="reading the pictures"):
        train, evaluation = load_images(data_args, training.do_eval)
    checkpoint = run.start()
    names = train.features["label"].names
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=training.seed, buffer_size=data_args.shuffle_buffer)
    model, processor = load_model(model_args, image_args, names)
    transform = ImageTransform(processor, augmentation)
    trainer = ImageTrainer(
        model,
        training,
        data_collator=ImageBatch(len(names), augmentation),
        train_dataset=samples(train, transform, training.seed),
        eval_dataset=samples(evaluation, transform, None),
        processing_class=processor,
        compute_metrics=image_metrics(len(names)),
        preprocess_logits_for_metrics=likeliest_classes,
    )
    run.finish(trainer, checkpoint)


if __name__ == "__main__":
    run_command(main)
