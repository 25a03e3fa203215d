"""Files to train on: what a folder may hold, what of it is named where it is damaged, and streams of few files."""

import importlib
import re

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader


datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def scripts():
    return importlib.import_module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def samples(scripts, folder, streaming):
    """Every row as training reads it."""
    load, augmentation = scripts("training.image_data"), scripts("training.augmentation")
    data, _ = load.load_images(load.ImageDataArguments(train_dir=str(folder), streaming=streaming), False)
    transform = augmentation.ImageTransform(
        scripts("digits_processor").digits_processor(), augmentation.AugmentationArguments()
    )
    return list((augmentation.ImageStream if streaming else augmentation.ImageSamples)(data, transform))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["short", "checksum", "text"])
def test_a_damaged_picture_is_named(scripts, pictures, damage, streaming):
    assert len(samples(scripts, pictures, streaming)) == 8
    path = pictures / "dog" / "2.png"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes({"short": path.read_bytes()[:900], "checksum": content, "text": b"no picture"}[damage])
    with pytest.raises(ValueError, match=rf"The picture .*{path} cannot be read: "):
        samples(scripts, pictures, streaming)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_other_formats_are_no_pictures_whatever_they_are_called(scripts, pictures, streaming, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("another program was run"))
    (pictures / "dog" / "2.png").write_bytes(POSTSCRIPT)
    with pytest.raises(
        ValueError, match=rf"The picture .*{pictures / 'dog' / '2.png'} cannot be read: cannot identify"
    ):
        samples(scripts, pictures, streaming)


def test_every_format_that_is_meant_is_read(scripts, tmp_path):
    Image.init()
    pictures = scripts("common.pictures")
    for name, endings in pictures.FORMATS.items():
        for ending in endings:
            Image.new("L", (9, 7), 200).save(tmp_path / f"one{ending}")
            found = pictures.read_picture(str(tmp_path / f"one{ending}"))
            assert (found.mode, found.size) == ("RGB", (9, 7)), name
            # JPEG and WebP are not exact.
            assert np.abs(np.asarray(found).astype(int) - 200).max() <= 3, name


def test_a_picture_is_the_right_way_up(scripts, tmp_path):
    """As `datasets` turns it, in training and in prediction alike."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    found = np.asarray(scripts("common.pictures").read_picture(str(tmp_path / "turned.png")))
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


@pytest.mark.parametrize("end", ["/", "//", "/."])
def test_a_folder_may_end_in_a_slash(scripts, pictures, end):
    assert len(samples(scripts, f"{pictures}{end}", streaming=False)) == 8


@pytest.mark.parametrize("place", ["stray.png", "cat/young/one.png", "more/cat/one.png"])
def test_a_picture_outside_its_class_is_refused(scripts, pictures, place):
    (pictures / place).parent.mkdir(parents=True, exist_ok=True)
    (pictures / "cat" / "0.png").rename(pictures / place)
    with pytest.raises(ValueError, match=f"`train_dir` must have one folder for each class.*{pictures / place}"):
        samples(scripts, pictures, False)


def test_what_is_no_picture_and_what_is_hidden_is_passed_over(scripts, pictures):
    (pictures / "notes.txt").write_text("notes")
    for place in (".trash/old/one.png", "__MACOSX/cat/one.png", ".one.png"):
        (pictures / place).parent.mkdir(parents=True, exist_ok=True)
        (pictures / place).write_bytes((pictures / "cat" / "0.png").read_bytes())
    assert len(samples(scripts, pictures, False)) == 8


def test_metadata_name_pictures_wherever_they_are(scripts, pictures):
    (pictures / "cat" / "0.png").rename(pictures / "stray.png")
    names = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    rows = [f"{name},{index % 2}" for index, name in enumerate(names)]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert len(samples(scripts, pictures, False)) == 8


@pytest.mark.parametrize("sample_by", ["document", "line"])
def test_a_text_that_is_not_utf8_is_named(scripts, tmp_path, sample_by):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("good\n", encoding="utf-8")
    (folder / "b.txt").write_bytes(b"good\ncaf\xe9\n")
    load = scripts("training.text_data")
    with pytest.raises(ValueError, match=f"{folder / 'b.txt'} must be text in UTF-8, line 2 is not: "):
        load.load_texts(load.TextDataArguments(train_dir=str(folder), sample_by=sample_by), False)


def parquet(**columns):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


GOOD = '{"text": "good"}\n'
DAMAGE = [
    ("jsonl", '{"content": "x"}\n', "FILE must have `text` in every row, line 1 has the fields content"),
    ("jsonl", GOOD + '\n{"content": "x"}\n', "FILE must have `text` in every row, line 3 has the fields content"),
    ("json", '[{"text": "x"}, {"n": 1}]', "FILE must have `text` in every row, row 2 has the fields n"),
    ("jsonl", '{"text": 5}\n', "`text` in line 1 of FILE must be text, got int 5"),
    ("jsonl", GOOD + '{"text": ["x"]}\n', "`text` in line 2 of FILE must be text, got list"),
    ("jsonl", "", "FILE must hold rows with `text`, it is empty"),
    ("jsonl", GOOD + '{"text": "y', "FILE must be JSON, line 2 is not, from column 10 on: Unterminated string"),
    ("json", '[{"text": "x"},\n{"text": "y"', "FILE must be JSON, line 2 is not, from column 13 on: Expecting"),
    ("jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', "FILE must be text in UTF-8, line 2 is not"),
    ("jsonl", GOOD + '{"text": "\\ud800"}\n', "`text` in line 2 of FILE must be text in UTF-8"),
    ("csv", "", "FILE must hold rows with `text`, it is empty"),
    ("csv", "id,text\n", "FILE must hold rows with `text`, it is empty"),
    ("csv", "id,content\n1,x\n", "FILE must have the column `text`, it has id, content"),
    ("csv", 'text\nx\n\n"y, or\nz"\nHello, world\n', "FILE must have the 1 fields text in every row, line 6 has 2"),
    ("csv", "id,text\n1,x\n2\n", "FILE must have the 2 fields id, text in every row, line 3 has 1"),
    ("csv", 'id,text\n1,x\n2,"y\nz\n', "FILE must be CSV, line 3 begins a row that is not: unexpected end of data"),
    ("csv", b"text\ngood\ncaf\xe9\n", "FILE must be text in UTF-8, line 3 is not"),
    ("parquet", b"", "FILE must be Parquet, it is not: "),
    ("parquet", parquet(text=["x"])[:-9], "FILE must be Parquet, it is not: "),
    ("parquet", parquet(text=pa.array([], pa.string())), "FILE must hold rows with `text`, it is empty"),
    ("parquet", parquet(text=[1]), "`text` of FILE must be text, got int64"),
    ("parquet", parquet(content=["x"]), "FILE must have the column `text`, it has content"),
    ("txt", b"good\ncaf\xe9\n", "FILE must be text in UTF-8, line 2 is not"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("ending", "content", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_what_is_wrong_with_a_text_is_named(scripts, tmp_path, ending, content, message, streaming):
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    load = scripts("training.text_data")
    with pytest.raises(ValueError, match=re.escape(message.replace("FILE", str(path)))):
        load.load_texts(load.TextDataArguments(train_file=[str(path)], streaming=streaming), False)


def test_the_one_file_that_is_damaged_is_named(scripts, tmp_path):
    for name, content in (("a", GOOD), ("b", GOOD + "{"), ("c", GOOD)):
        (tmp_path / f"{name}.jsonl").write_text(content)
    load = scripts("training.text_data")
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'b.jsonl'} must be JSON, line 2"):
        load.load_texts(load.TextDataArguments(train_dir=str(tmp_path)), False)


def test_texts_of_every_kind_are_read(scripts, tmp_path):
    load = scripts("training.text_data")
    contents = {
        "lines.jsonl": b'{"text": "a"}\n\n{"text": null}\n{"text": "b", "n": 1}\n',
        "list.json": b'[{"text": "a"},\n {"text": null}, {"text": "b"}]',
        "rows.csv": b'\xef\xbb\xbfn,text\n1,a\n\n2,NA\n3,5\n4,"b, ""c""\nd"\n',
        "rows.parquet": parquet(text=["a", None, "b"]),
        "large.parquet": parquet(text=pa.array(["a", None, "b"], pa.large_string())),
    }
    # Whatever it looks like, a field of CSV is text.
    texts = {"rows.csv": ["a", "NA", "5", 'b, "c"\nd']}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for streaming in (False, True):
            args = load.TextDataArguments(train_file=[str(tmp_path / name)], streaming=streaming)
            train, _ = load.load_texts(args, False)
            assert [row["text"] for row in train] == texts.get(name, ["a", None, "b"]), name


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_document_in_csv(scripts, tmp_path, streaming):
    """Python's module takes fields of 131,072 characters by default."""
    text = "word, " * 30_000
    (tmp_path / "long.csv").write_text(f'id,body\n1,"{text}"\n')
    load = scripts("training.text_data")
    args = load.TextDataArguments(train_file=[str(tmp_path / "long.csv")], text_column="body", streaming=streaming)
    train, _ = load.load_texts(args, False)
    assert [row["text"] for row in train] == [text]


def test_a_folder_that_is_called_like_a_text(scripts, tmp_path):
    folder = tmp_path / "texts"
    (folder / "x.py").mkdir(parents=True)
    (folder / "x.py" / "inner.txt").write_text("inner")
    (folder / "a.txt").write_text("outer")
    load = scripts("training.text_data")
    train, _ = load.load_texts(load.TextDataArguments(train_dir=str(folder)), False)
    assert sorted(train["text"]) == ["inner", "outer"]


@pytest.fixture
def stream(scripts, tmp_path):
    """A stream of files with as many rows as are told, and what makes endless blocks of it."""

    def make(*counts, first=None):
        for index, count in enumerate(counts):
            (tmp_path / f"{index}.txt").write_text("".join(f"{index} {row}\n" for row in range(count)))
        load = scripts("training.text_data")
        files = [str(tmp_path / f"{index}.txt") for index in range(len(counts))]
        args = load.TextDataArguments(train_file=files, sample_by="line", streaming=True, max_train_samples=first)
        train, _ = load.load_texts(args, False)
        return scripts("training.text_blocks").BlockStream(train.shuffle(seed=0, buffer_size=4))

    return make


@pytest.mark.parametrize(("counts", "first"), [((5,), None), ((0, 5), None), ((5, 0), None), ((5, 3), 4)])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_more_loading_processes_than_files(stream, counts, first, workers):
    data, total = stream(*counts, first=first), first or sum(counts)
    rows = iter(DataLoader(data, batch_size=None, num_workers=workers))
    found = [next(rows)["text"] for _ in range(4 * total)]
    # Every row in turn, epoch after epoch.
    assert len(set(found)) == total
    if len(counts) == 1:
        assert all(found.count(text) == 4 for text in found)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_empty_stream_is_an_error(stream, workers):
    with pytest.raises(ValueError, match="The stream to train on is empty"):
        next(iter(DataLoader(stream(0, 0), batch_size=None, num_workers=workers)))
