"""Augmentation: what is drawn, that it is drawn again alike, and that mixed labels fit mixed pictures."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader


pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def augmentation():
    return importlib.import_module("training.augmentation")


@pytest.fixture(scope="module")
def processor(augmentation):
    return importlib.import_module("digits_processor").digits_processor()


def picture(width=24, height=20, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def strong(augmentation):
    pytest.importorskip("kornia")
    return augmentation.AugmentationArguments(crop_scale=0.3, flip_probability=0.5, rand_augment_ops=2)


def test_without_a_seed_or_without_augmentation_the_processor_decides(augmentation, processor):
    expected = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    for args, seed in ((augmentation.AugmentationArguments(), 5), (strong(augmentation), None)):
        assert torch.equal(augmentation.ImageTransform(processor, args)(picture(), seed), expected)


def test_a_seed_says_everything_and_leaves_other_numbers_alone(augmentation, processor):
    transform = augmentation.ImageTransform(processor, strong(augmentation))
    before = torch.get_rng_state()
    pixels = [transform(picture(), seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert all(torch.equal(transform(picture(), seed), pixels[seed]) for seed in range(8))
    assert len({tuple(image.flatten().tolist()) for image in pixels}) == 8


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_of_picture_becomes_rgb(augmentation, processor, mode):
    transform = augmentation.ImageTransform(processor, strong(augmentation))
    pixels = augmentation.sample({"image": picture().convert(mode), "label": 0}, transform, 1)["pixel_values"]
    assert pixels.shape == (3, 16, 16)
    assert pixels.isfinite().all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_16_bits_is_that_of_8(augmentation, processor, mode):
    """Whichever of the two usual ways the bits were doubled."""
    transform = augmentation.ImageTransform(processor, augmentation.AugmentationArguments())
    eight = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    pictures = [Image.fromarray(eight)]
    for factor in (256, 257):
        wide = (eight.astype(np.int32) * factor).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
        pictures.append(Image.frombytes(mode, (16, 16), wide.tobytes()))
    if mode == "I":
        pictures.append(Image.fromarray(eight.astype(np.int32)))
    assert pictures[1].mode == mode
    first, *others = [
        augmentation.sample({"image": one, "label": 0}, transform, None)["pixel_values"] for one in pictures
    ]
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_pixels_beyond_16_bits_are_refused(augmentation, processor, values):
    transform = augmentation.ImageTransform(processor, augmentation.AugmentationArguments())
    row = {"image": Image.fromarray(np.array([values], dtype=np.int32)), "label": 0}
    with pytest.raises(ValueError, match=f"must be at least 0 and at most 65535, got {values[0]} to {values[1]}"):
        augmentation.sample(row, transform, None)


def test_floating_point_grey_is_from_0_to_1(augmentation, processor):
    transform = augmentation.ImageTransform(processor, augmentation.AugmentationArguments())
    eight = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    pictures = [Image.fromarray(eight), Image.fromarray((eight / 255).astype(np.float32))]
    assert pictures[1].mode == "F"
    first, second = [
        augmentation.sample({"image": one, "label": 0}, transform, None)["pixel_values"] for one in pictures
    ]
    assert torch.equal(first, second)
    for values in ([0.0, 255.0], [-0.5, 0.5], [0.0, float("nan")]):
        row = {"image": Image.fromarray(np.array([values], dtype=np.float32)), "label": 0}
        with pytest.raises(ValueError, match="pixels of mode F must be at least 0 and at most 1, got "):
            augmentation.sample(row, transform, None)


def test_flip_mirrors(augmentation, processor):
    args = augmentation.AugmentationArguments(flip_probability=1.0)
    flipped = augmentation.ImageTransform(processor, args)(picture(16, 16), 0)
    plain = processor(images=picture(16, 16), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(flipped, plain.flip(-1))


@pytest.mark.parametrize(("width", "height"), [(24, 20), (7, 90), (90, 7), (1, 1), (200, 1)])
def test_crops_lie_inside_and_keep_their_share(augmentation, width, height):
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = augmentation.crop_box(width, height, 0.5, random)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        # Sides are whole pixels.
        assert (right - left + 1) * (bottom - top + 1) >= 0.5 * width * height


def test_loading_processes_do_not_matter_and_epochs_do(augmentation, processor):
    rows = [{"image": picture(seed=index), "label": index % 3} for index in range(6)]
    data = augmentation.ImageSamples(rows, augmentation.ImageTransform(processor, strong(augmentation)), seed=3)
    collate = augmentation.ImageBatch(3, augmentation.AugmentationArguments(mixup_alpha=1.0, cutmix_alpha=1.0))
    found = {}
    for workers in (0, 2):
        loader = DataLoader(
            data,
            3,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=None,
        )
        for epoch in (0, 1):
            data.set_epoch(epoch)
            found[workers, epoch] = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(found[0, 0], found[2, 0])
    assert torch.equal(found[0, 1], found[2, 1])
    assert not torch.equal(found[0, 0], found[0, 1])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_labels_are_the_shares_of_mixed_pictures(augmentation, mix):
    args = augmentation.AugmentationArguments(**{f"{mix}_alpha": 1.0})
    collate = augmentation.ImageBatch(4, args)
    shares = []
    for seed in range(20):
        # A picture is its class everywhere, so that a mean tells how much of which class is in it.
        samples = [
            {"pixel_values": torch.eye(4)[label].view(4, 1, 1).expand(4, 6, 9), "labels": label, "seed": seed}
            for label in range(4)
        ]
        batch = collate(samples)
        torch.testing.assert_close(batch["pixel_values"].mean(dim=(2, 3)), batch["labels"], atol=1e-6, rtol=0)
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
        shares.append(batch["labels"].max().item())
    assert min(shares) < 0.9


def test_evaluation_is_not_mixed(augmentation):
    collate = augmentation.ImageBatch(4, augmentation.AugmentationArguments(mixup_alpha=1.0))
    batch = collate([{"pixel_values": torch.zeros(3, 2, 2), "labels": 1}] * 2)
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", 0.0),
        ("crop_scale", 1.5),
        ("flip_probability", -0.1),
        ("rand_augment_ops", 16),
        ("rand_augment_magnitude", 30),
        ("mixup_alpha", -1),
        ("cutmix_alpha", float("inf")),
    ],
)
def test_errors_name_field_and_value(augmentation, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*{value}"):
        augmentation.AugmentationArguments(**{name: value})
