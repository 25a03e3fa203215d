"""The options that name the data of a training."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.command import require, require_least


DIGITS, STANDARD_LIBRARY = "digits", "stdlib"
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
SAMPLE_BY = ("document", "paragraph", "line")


@dataclass
class DataArguments:
    """Which data to train and to evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name on the Hub, or of a bundled dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    streaming: bool = field(default=False, metadata={"help": "Whether to stream the data; needs `max_steps`."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Size of the shuffle buffer of a stream, in samples."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of the data to train on."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of the data to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": f"Split to evaluate on; if not given, the first of {', '.join(EVALUATION_SPLITS)}."},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share to hold out if the data have only one split; always the same samples."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train only on the first ones."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate only on the first ones."})
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder of the prepared data."})
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes that prepare the data."})

    def __post_init__(self):
        require(self, "validation_share", lambda share: 0 <= share < 1, "at least 0 and less than 1")
        require_least(self, shuffle_buffer=1, max_train_samples=1, max_eval_samples=1, num_proc=1)

    @property
    def has_training_data(self) -> bool:
        """Whether a folder or files to train on are given, or a dataset without the split of it to evaluate on."""
        files = any(getattr(self, name, None) for name in ("train_dir", "train_file"))
        return files or (self.dataset_name is not None and self.validation_split is None)


@dataclass
class ImageDataArguments(DataArguments):
    """Pictures: `dataset_name` (a name on the Hub, or "digits"), or `train_dir` with one folder of pictures for each class."""

    image_column: str | None = field(default=None, metadata={"help": "Column of the pictures; detected if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes; detected if not given."})
    test_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of pictures, with classes or without, to classify at the end into predictions.csv."},
    )


@dataclass
class TextDataArguments(DataArguments):
    """Text: `dataset_name` (a name on the Hub, or "stdlib"), `train_file`, or `train_dir`."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text, JSON lines, CSV or Parquet files to train on.", "nargs": "+"}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same, to evaluate on.", "nargs": "+"}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text, in JSON, CSV and Parquet."})
    sample_by: str = field(
        default="document", metadata={"help": "What a sample of a text file is: the document, a paragraph, or a line."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_by not in SAMPLE_BY:
            raise ValueError(f"`sample_by` must be one of {', '.join(SAMPLE_BY)}, got {self.sample_by!r}.")
