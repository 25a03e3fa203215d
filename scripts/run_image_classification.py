"""Trains an image classifier, new or from a checkpoint.

    python scripts/run_image_classification.py scripts/recipes/digits.yaml --output_dir runs/digits
    python scripts/run_image_classification.py --train_dir pictures --image_size 32 --patch_size 8 --output_dir runs/pictures

A folder of pictures has a subfolder per class. Rerun the command to resume from the last complete checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.canvas import PLACEMENTS, Canvas
from common.command import run_command
from common.saved_files import CONFUSION, EVALUATION_CONFUSION, PREDICTIONS, write_whole
from common.saved_models import require_preprocessor
from common.tables import as_csv
from datasets import IterableDataset
from predict import FIELDS, classify, expand
from predict import load as load_classifier
from training.arguments import ModelArguments, new_config, refuse_new_model_options
from training.augmentation import AugmentationArguments, ImageBatch, ImageSamples, ImageStream, ImageTransform
from training.data_arguments import ImageDataArguments
from training.image_data import load_images, with_classes
from training.loading import AnyDataset, require_folder
from training.metrics import image_metrics, likeliest_classes, metrics_with_picture
from training.run import Run
from training.trainer import ImageTrainer
from training.weights import load_checkpoint
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel
from transformers import ViTImageProcessorPil as ImageProcessor

from translution import TranslutionConfig, TranslutionForImageClassification


@dataclass
class ImageArguments:
    """The shape of the pictures."""

    image_size: int | None = field(
        default=None,
        metadata={"help": "Size that pictures are resized to, in pixels; `canvas_size` where that is given."},
    )
    patch_size: int | None = field(default=None, metadata={"help": "Patch size of a new model, in pixels."})
    image_mean: list[float] = field(default_factory=lambda: [0.5] * 3, metadata={"help": "Mean of each channel."})
    image_std: list[float] = field(
        default_factory=lambda: [0.5] * 3, metadata={"help": "Standard deviation of each channel."}
    )
    canvas_size: int | None = field(
        default=None,
        metadata={
            "help": "Place each picture, as large as it is, on an empty canvas of that height and width, in pixels."
        },
    )
    placement: str | None = field(
        default=None,
        metadata={
            "help": f"Where on the canvas: {PLACEMENTS[0]}, in the middle (the default), or {PLACEMENTS[1]}, anywhere; anew in "
            "each epoch of training, and always at the same place in evaluation."
        },
    )

    def __post_init__(self):
        if self.canvas is not None:
            if self.image_size not in (None, self.canvas_size):
                raise ValueError(f"`image_size` must be `canvas_size`, {self.canvas_size}, got {self.image_size}.")
            self.image_size = self.canvas_size
        elif self.placement is not None:
            raise ValueError(
                f"`placement` needs `canvas_size`, the canvas to place pictures on; got {self.placement!r}."
            )

    @property
    def canvas(self) -> Canvas | None:
        """What pictures are placed on, if anything."""
        if self.canvas_size is None:
            return None
        return Canvas(self.canvas_size, PLACEMENTS[0] if self.placement is None else self.placement)


def parse(arguments: Sequence[str]) -> Run:
    """The run of a command line; errors as `parse_arguments`."""
    own = [ImageArguments, AugmentationArguments]
    description = __doc__.splitlines()[0]
    return Run.parse(
        "run_image_classification.py", "image-classification", ImageDataArguments, own, arguments, description
    )


def model_config(args: ModelArguments, image: ImageArguments, **labels: Any) -> TranslutionConfig:
    """The config of a new model, with `labels` as classes; errors as `new_config`."""
    asked = {"image_size": image.image_size, "patch_size": image.patch_size}
    return new_config(args, {"modality": "image", **labels}, asked)


def load_model(
    args: ModelArguments, image: ImageArguments, names: list[str] | None, trains: bool = True
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model to train, or only to evaluate, whose classes are `names`, for None the checkpoint's, and its image processor.

    Raises:
        ValueError: for options that contradict each other, the config, or the checkpoint.
    """
    labels = {}
    if names is not None:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if args.model_name_or_path is None:
        config = model_config(args, image, **labels)
        if config.num_channels != 3:
            raise ValueError(f"`num_channels` must be 3, pictures are read as RGB, got {config.num_channels}.")
        height, width = config.image_height_width
        processor = ImageProcessor(
            size={"height": height, "width": width},
            do_convert_rgb=True,
            image_mean=image.image_mean,
            image_std=image.image_std,
        )
        if image.canvas is not None:
            image.canvas.keep_in(processor)
        return TranslutionForImageClassification(config), processor
    refuse_new_model_options(args)
    model = load_checkpoint(AutoModelForImageClassification, args, trains, **labels)
    require_preprocessor(args.model_name_or_path, "image", args.model_revision)
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
    if image.canvas is not None:
        image.canvas.keep_in(processor)
    elif image.image_size is not None:
        Canvas.remove_from(processor)
    return model, processor


def samples(data: AnyDataset | None, transform: ImageTransform, seed: int | None) -> ImageSamples | ImageStream | None:
    if data is None:
        return None
    return (ImageStream if isinstance(data, IterableDataset) else ImageSamples)(data, transform, seed)


def pictures_to_predict(folder: str | None) -> list[str]:
    """The pictures in `test_dir` and below it.

    Raises:
        FileNotFoundError: if it is no folder.
        ValueError: if it has no pictures.
    """
    if folder is None:
        return []
    require_folder(folder, "test_dir")
    return expand([folder])


def write_predictions(run: Run, model: str, pictures: Sequence[str], canvas: Canvas | None) -> None:
    """Writes `predictions.csv`: of each picture, placed on a canvas if there is one, the file, the likeliest class and its
    probability.
    """
    classifier = load_classifier(model)
    if canvas is not None:
        # Evaluation may place pictures otherwise than training did.
        canvas.keep_in(classifier.image_processor)
    classes = classify(classifier, pictures, top_k=1, batch_size=run.training.per_device_eval_batch_size)
    rows = [row for found in classes for row in found]
    write_whole(run.folder / PREDICTIONS, as_csv(FIELDS["image-classification"], rows).encode())
    print(f"{len(rows)} pictures classified: {run.folder / PREDICTIONS}", flush=True)


def main(arguments: Sequence[str]):
    run = parse(arguments)
    data_args, training, (image_args, augmentation) = run.data, run.training, run.others
    pictures = pictures_to_predict(data_args.test_dir)
    train = evaluation = None
    # A saved model has its classes, and needs none to classify.
    if not (pictures and run.only_evaluates and not training.do_eval):
        with training.main_process_first(desc="reading the pictures"):
            train, evaluation = load_images(data_args, training.do_eval, not run.only_evaluates)
    checkpoint = run.start()
    if isinstance(train, IterableDataset):
        train = train.shuffle(seed=training.seed, buffer_size=data_args.shuffle_buffer)
    names = None if train is None else train.features["label"].names
    model, processor = load_model(run.model, image_args, names, training.do_train)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if train is None and evaluation is not None:
        evaluation = with_classes(evaluation, names, "model")
    canvas = Canvas.of(processor)
    transform = ImageTransform(processor, augmentation, canvas)
    picture = run.folder / (CONFUSION if training.do_train else EVALUATION_CONFUSION)
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
    run.finish(trainer, checkpoint, metrics_with_picture(names, picture))
    if pictures and trainer.is_world_process_zero():
        saved = str(run.folder) if training.do_train else run.evaluated(checkpoint)
        write_predictions(run, saved, pictures, canvas)


if __name__ == "__main__":
    run_command(main)
