"""Feature extractors: taps by index and by module name, default taps, and errors."""

import copy

import pytest
import timm
import torch
from torch import nn

from lfcc_kernels.distill import Tap, available_taps, create_extractor, default_taps

# A CNN, ViTs with one and with two prefix tokens, an MLP without any, and a model whose blocks are NHWC.
MODELS = ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224", "gmlp_ti16_224", "test_mambaout"]


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sized = {} if name in ("test_resnet", "test_mambaout") else {"img_size": 64}
    return timm.create_model(name, num_classes=5, **sized, **kwargs).eval()


@pytest.mark.parametrize("name", MODELS)
def test_one_forward_gives_the_logits_and_timms_maps(name: str) -> None:
    model, images = make(name), torch.randn(2, 3, 64, 64)
    extractor = create_extractor(model, [1, 3], image_size=64)
    logits, features = extractor(images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=0)
    expected = model.forward_intermediates(images, [1, 3], intermediates_only=True)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    assert [tuple(feature.shape[1:]) for feature in features] == [(t.channels, *t.grid) for t in extractor.taps]
    assert extractor.channels == [model.feature_info[index]["num_chs"] for index in (1, 3)]


def test_tokens_become_maps_without_a_copy() -> None:
    model = make("test_vit")
    extractor = create_extractor(model, [0], image_size=64)
    tokens = []
    model.blocks[0].register_forward_hook(lambda module, args, output: tokens.append(output))
    features = extractor(torch.randn(2, 3, 64, 64))[1]
    assert features[0].untyped_storage().data_ptr() == tokens[0].untyped_storage().data_ptr()
    assert extractor.taps[0] == Tap(0, "blocks.0", 64, (4, 4), "tokens", prefix_tokens=1)


@pytest.mark.parametrize(
    ("name", "modules", "indices"),
    [
        ("test_resnet", ["layer1", "layer4"], [1, 4]),
        ("test_vit", ["blocks.2", "blocks.5"], [2, 5]),
        ("test_mambaout", ["stages.0", "stages.3"], [0, 3]),
    ],
)
def test_taps_by_module_name_equal_taps_by_index(name: str, modules: list[str], indices: list[int]) -> None:
    model, images = make(name), torch.randn(2, 3, 64, 64)
    hooked, indexed = (create_extractor(model, taps, image_size=64) for taps in (modules, indices))
    torch.testing.assert_close(hooked(images)[1], indexed(images)[1], rtol=0, atol=0)
    assert [tap.grid for tap in hooked.taps] == [tap.grid for tap in indexed.taps]
    assert hooked.channels == indexed.channels


def test_taps_of_a_model_that_is_not_in_timm() -> None:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.block, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(images).flatten(2).mT
            tokens = self.block(torch.cat([tokens[:, :1], tokens], 1))
            return self.head(tokens[:, 0])

    model, images = Transformer(), torch.randn(2, 3, 16, 48)
    extractor = create_extractor(model, ["block"], image_size=(16, 48), prefix_tokens=1)
    assert extractor.taps[0].grid == (2, 6)
    torch.testing.assert_close(
        extractor(images)[1][0], nn.functional.conv2d(
            model.patches(images), model.block.weight[..., None, None], model.block.bias
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"13 tokens, expected 0 prefix tokens and a grid"):
        create_extractor(model, ["block"], image_size=(16, 48))
    with pytest.raises(ValueError, match="set grid="):
        create_extractor(model, ["block"], image_size=(16, 48), prefix_tokens=1, grid=(3, 3))
    with pytest.raises(ValueError, match=r"'head' returns \(1, 2\)"):
        create_extractor(model, ["head"], image_size=(16, 48))
    with pytest.raises(ValueError, match="has no forward_intermediates: use module names"):
        create_extractor(model)


def test_hooks_of_a_copied_model_record_nothing() -> None:
    extractor = create_extractor(make("test_resnet"), ["layer1"], image_size=32)
    average = copy.deepcopy(extractor.model)
    images = torch.randn(1, 3, 32, 32)
    features = extractor(images)[1][0].clone()
    average(2 * images)
    assert extractor._recorded is None
    torch.testing.assert_close(extractor(images)[1][0], features, rtol=0, atol=0)


def test_without_taps_only_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("test_vit")
    extractor = create_extractor(model, [], image_size=64)
    monkeypatch.setattr(model, "forward_intermediates", None)
    logits, features = extractor(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5) and features == []


def test_preprocess_is_applied_to_the_images() -> None:
    model, images = make("test_resnet"), torch.randn(2, 3, 32, 32)
    extractor = create_extractor(model, [1], image_size=64, preprocess=nn.Upsample(scale_factor=2))
    torch.testing.assert_close(extractor(images)[0], model(nn.functional.interpolate(images, scale_factor=2)))


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(14, 14)] * 12, [1, 3, 9, 11]),
        ([(14, 14)] * 6, [0, 1, 4, 5]),
        ([(14, 14)] * 5, [0, 1, 3, 4]),
        ([(14, 14)] * 4, [0, 1, 2, 3]),
        ([(14, 14)] * 2, [0, 1]),
        ([(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)], [1, 2, 3, 4]),
    ],
)
def test_default_taps(grids: list[tuple[int, int]], expected: list[int]) -> None:
    taps = [Tap(index, "", 1, grid, "maps") for index, grid in enumerate(grids)]
    assert [tap.name for tap in default_taps(taps)] == expected


def test_listing_taps_does_not_change_the_model() -> None:
    model = make("test_resnet").train()
    before = copy.deepcopy(model.state_dict())
    available_taps(model, 32)
    create_extractor(model, ["layer2"], image_size=32)
    assert model.training and model.layer1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([5], "ResNet has no tap 5, expected 0 to 4"),
        ([-1], "ResNet has no tap -1, expected 0 to 4"),
        ([1, 1], "expected each tap once"),
        ([1, "layer2"], "expected only indices or only module names"),
        (["layer9"], "has no module 'layer9'"),
        (["fc"], r"'fc' returns \(1, 5\), expected maps"),
    ],
)
def test_invalid_taps_raise(taps: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_extractor(make("test_resnet"), taps, image_size=32)
