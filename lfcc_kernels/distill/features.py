"""Logits and intermediate features of a vision model from one forward pass.

`create_extractor` wraps a model; `forward(images)` of the wrapper returns `(logits, features)`, with one feature map
(B, C, H, W) per tap. Taps of timm models are indices of `forward_intermediates`; taps of other models are module names,
read by forward hooks. Tokens are returned as maps too: without prefix tokens, viewed as (B, C, H, W) without a copy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

Features = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Tap:
    """A feature layer of a model.

    `name` is an index of timm's `forward_intermediates` or a module name; `module` is the name of the module, or its
    type. `grid` is (H, W) in cells; `prefix_tokens` is the number of class and register tokens, which are removed.
    """

    name: int | str
    module: str
    channels: int
    grid: tuple[int, int]
    layout: Literal["maps", "tokens"]
    prefix_tokens: int = 0


class FeatureExtractor(nn.Module):
    """A model with taps. `preprocess` is applied to the images first. Without taps only logits are computed."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap], preprocess: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.taps = tuple(taps)
        self.preprocess = nn.Identity() if preprocess is None else preprocess

    @property
    def channels(self) -> list[int]:
        return [tap.channels for tap in self.taps]

    @property
    def num_classes(self) -> int:
        return cast(int, self.model.num_classes)

    def forward(self, images: Tensor) -> Features:
        images = self.preprocess(images)
        return self._forward_taps(images) if self.taps else (self.model(images), [])

    def _forward_taps(self, images: Tensor) -> Features:
        raise NotImplementedError


class IntermediatesExtractor(FeatureExtractor):
    """Taps of a timm model by index."""

    def _forward_taps(self, images: Tensor) -> Features:
        last, features = self.model.forward_intermediates(
            images,
            indices=[tap.name for tap in self.taps],
            output_fmt="NLC" if self.taps[0].layout == "tokens" else "NCHW",
        )
        if self.taps[0].layout == "tokens":
            features = [_tokens_to_map(tokens, tap.grid) for tokens, tap in zip(features, self.taps, strict=True)]
        return self.model.forward_head(last), features


class HookExtractor(FeatureExtractor):
    """Taps of any model by module name. The modules must return maps (B, C, H, W) or tokens (B, N, C)."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap], preprocess: nn.Module | None = None) -> None:
        super().__init__(model, taps, preprocess)
        # None outside `forward`, since copies of the model, such as its moving average, have the hooks too.
        self._recorded: dict[int | str, Tensor] | None = None
        for tap in taps:
            model.get_submodule(str(tap.name)).register_forward_hook(self._recorder(tap.name))

    def _recorder(self, name: int | str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self._recorded is not None:
                self._recorded[name] = output

        return record

    def _forward_taps(self, images: Tensor) -> Features:
        self._recorded = {}
        try:
            logits = self.model(images)
            outputs = [self._recorded[tap.name] for tap in self.taps]
        finally:
            self._recorded = None
        return logits, [self._as_map(output, tap) for output, tap in zip(outputs, self.taps, strict=True)]

    def _as_map(self, output: Tensor, tap: Tap) -> Tensor:
        if tap.layout == "tokens":
            return _tokens_to_map(output[:, tap.prefix_tokens :], tap.grid)
        return output.permute(0, 3, 1, 2) if _is_channels_last(self.model) else output


def create_extractor(
    model: nn.Module,
    taps: Sequence[int | str] | None = None,
    *,
    image_size: int | tuple[int, int] = 224,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    preprocess: nn.Module | None = None,
) -> FeatureExtractor:
    """Wrap `model` for RGB images.

    Args:
        model: any vision model.
        taps: indices for a model with timm's `forward_intermediates`, sorted by depth; module names for any model;
            None selects four indices with `default_taps`; an empty list computes logits only.
        image_size: side of the images in pixels, or (H, W).
        grid, prefix_tokens: layout of the tokens of hooked modules. By default `grid` follows from the image size and
            square patches, and `prefix_tokens` from the model.
        preprocess: applied to the images first.

    Raises ValueError for a tap that does not exist, or whose output is neither maps nor tokens.
    """
    if taps is None:
        return IntermediatesExtractor(model, default_taps(available_taps(model, image_size)), preprocess)
    if len(set(taps)) != len(taps):
        raise ValueError(f"taps are {list(taps)}, expected each tap once")
    indices = [tap for tap in taps if isinstance(tap, int)]
    names = [tap for tap in taps if isinstance(tap, str)]
    if len(indices) == len(taps):
        available = available_taps(model, image_size) if taps else ()
        if unknown := [tap for tap in indices if not 0 <= tap < len(available)]:
            raise ValueError(f"{type(model).__name__} has no tap {unknown[0]}, expected 0 to {len(available) - 1}")
        return IntermediatesExtractor(model, [available[tap] for tap in sorted(indices)], preprocess)
    if len(names) == len(taps):
        return HookExtractor(model, _hooked_taps(model, names, image_size, grid, prefix_tokens), preprocess)
    raise ValueError(f"taps are {list(taps)}, expected only indices or only module names")


@torch.no_grad()
def available_taps(model: nn.Module, image_size: int | tuple[int, int] = 224) -> tuple[Tap, ...]:
    """All taps of a model with timm's `forward_intermediates`; runs one forward pass on a blank image."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates: use module names as taps")
    with _evaluating(model):
        images = _blank_images(model, image_size)
        maps = model.forward_intermediates(images, intermediates_only=True)
        tokens = _has_tokens(model, images)
    modules = [info["module"] for info in model.feature_info]
    return tuple(
        Tap(
            name=index,
            module=module,
            channels=features.shape[1],
            grid=tuple(features.shape[2:]),
            layout="tokens" if tokens else "maps",
            prefix_tokens=_prefix_tokens(model),
        )
        for index, (module, features) in enumerate(zip(modules, maps, strict=True))
    )


def default_taps(taps: Sequence[Tap]) -> tuple[Tap, ...]:
    """Four taps: the last four, or, if all grids are equal, those at 1/6, 1/3, 5/6 and 6/6 of the depth.

    The latter are blocks 1, 3, 9 and 11 of 12, as in OFA-KD (arXiv 2310.19444).
    """
    depth = len(taps)
    if depth > 4 and len({tap.grid for tap in taps}) == 1:
        return tuple(taps[max(round(depth * sixths / 6) - 1, 0)] for sixths in (1, 2, 5, 6))
    return tuple(taps[-4:])


@torch.no_grad()
def _hooked_taps(
    model: nn.Module,
    names: Sequence[str],
    image_size: int | tuple[int, int],
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> list[Tap]:
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no module {unknown[0]!r}: model.named_modules() lists the names")
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    handles = [modules[name].register_forward_hook(recorder(name)) for name in names]
    try:
        with _evaluating(model):
            images = _blank_images(model, image_size)
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    prefix = _prefix_tokens(model) if prefix_tokens is None else prefix_tokens
    return [_hooked_tap(model, name, outputs.get(name), images.shape[2:], grid, prefix) for name in names]


def _hooked_tap(
    model: nn.Module, name: str, output: object, image_size: Sequence[int], grid: tuple[int, int] | None, prefix: int
) -> Tap:
    if isinstance(output, Tensor) and output.ndim == 4:
        shape = output.permute(0, 3, 1, 2).shape if _is_channels_last(model) else output.shape
        return Tap(name, type(model.get_submodule(name)).__name__, shape[1], (shape[2], shape[3]), "maps")
    if isinstance(output, Tensor) and output.ndim == 3:
        cells = output.shape[1] - prefix
        patch = math.sqrt(image_size[0] * image_size[1] / max(cells, 1))
        guess = (round(image_size[0] / patch), round(image_size[1] / patch))
        grid = guess if grid is None else grid
        if grid[0] * grid[1] != cells:
            raise ValueError(
                f"tap {name!r} has {output.shape[1]} tokens, expected {prefix} prefix tokens and a grid of "
                f"{grid[0]} x {grid[1]}: set grid=(H, W) and prefix_tokens"
            )
        return Tap(name, type(model.get_submodule(name)).__name__, output.shape[2], grid, "tokens", prefix)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"tap {name!r} returns {found}, expected maps (B, C, H, W) or tokens (B, N, C)")


def _tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H*W, C) viewed as (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _has_tokens(model: nn.Module, images: Tensor) -> bool:
    try:
        tokens = model.forward_intermediates(images, indices=[0], output_fmt="NLC", intermediates_only=True)
    except AssertionError:  # raised by timm for a model without tokens
        return False
    return tokens[0].ndim == 3


def _prefix_tokens(model: nn.Module) -> int:
    return getattr(model, "num_prefix_tokens", 0)


def _is_channels_last(model: nn.Module) -> bool:
    """Whether the blocks of a timm model return (B, H, W, C), e.g. in Swin."""
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that a forward pass does not change running statistics."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _blank_images(model: nn.Module, image_size: int | tuple[int, int]) -> Tensor:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return next(model.parameters()).new_zeros(1, 3, height, width)
