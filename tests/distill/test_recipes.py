"""The recipes in configs/ follow the protocol of OFA-KD, agree with each other, and train."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn

from lfcc_kernels.bench.ofa import MODELS
from lfcc_kernels.distill import Distiller, build, command, config, loop, models
from lfcc_kernels.distill.data import ImageArrays

CONFIGS = Path(__file__).parents[2] / "configs"
CNNS = ("resnet18", "mobilenetv2")
# Teachers and students of OFA-KD (arXiv 2310.19444), tables 1 and 2.
PAIRS = {
    "cifar100": [
        (("swin_t", "vit_s", "mixer_b16"), CNNS),
        (("convnext_t", "mixer_b16"), ("deit_t", "swin_p")),
        (("convnext_t", "swin_t"), ("resmlp_12",)),
    ],
    "imagenet": [
        (("deit_t", "swin_t", "mixer_b16"), CNNS),
        (("resnet50", "convnext_t", "mixer_b16"), ("deit_t", "swin_n")),
        (("resnet50", "convnext_t", "swin_t"), ("resmlp_12",)),
    ],
}
NAMES = [
    f"{data}/{teacher}-{student}"
    for data, groups in PAIRS.items()
    for teachers, students in groups
    for student in students
    for teacher in teachers
]
SWINS = {"swin_n": 64, "swin_p": 48}  # widths of the two that timm does not have
CLASSES = {"cifar100": 100, "imagenet": 1000}
OF_MODELS = ("student", "student_kwargs", "teacher", "teacher_kwargs")


def read(name: str) -> dict[str, Any]:
    """All options of a recipe, through the parser."""
    parser = config.create_parser()
    return config.as_config(config.merge(parser, [], config.read_yaml(CONFIGS / f"{name}.yaml")))


def test_there_are_12_and_15_pairs() -> None:
    assert sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.*")) == sorted(
        NAMES
    )
    assert [sum(name.startswith(data) for name in NAMES) for data in PAIRS] == [12, 15]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_its_models(name: str) -> None:
    teacher, student = name.partition("/")[2].split("-")
    recipe, text = read(name), (CONFIGS / f"{name}.yaml").read_text()
    assert recipe["student"] == MODELS[student].timm
    assert recipe["teacher"].partition(".")[0] == MODELS[teacher].timm
    assert f"-c configs/{name}.yaml" in text
    assert name.startswith("cifar100") or recipe["teacher"] in timm.list_pretrained()
    if student in SWINS:
        made_of = {"embed_dim": SWINS[student], "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16]}
        assert made_of.items() <= recipe["student_kwargs"].items()


@pytest.mark.parametrize("data", PAIRS)
@pytest.mark.parametrize("of_cnns", [True, False], ids=["cnn", "vit_mlp"])
def test_recipes_of_a_protocol_differ_in_their_models_only(data: str, of_cnns: bool) -> None:
    same = [name for name in NAMES if name.startswith(data) and (name.partition("-")[2] in CNNS) == of_cnns]
    written = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in same]
    options = [{key: value for key, value in recipe.items() if key not in OF_MODELS} for recipe in written]
    assert all(recipe == options[0] for recipe in options[1:])
    sides = [recipe.get(f"{side}_kwargs", {}) for recipe in written for side in ("student", "teacher")]
    assert len({str(side.get("pretrained_cfg_overlay")) for side in sides}) == 1


def test_protocols_are_those_of_ofa_kd() -> None:
    """Option by option."""
    shared = {"smoothing": 0.1, "kd_temperature": 1.0, "kd_alpha": 1.0, "img_size": 224, "reprob": 0.0, "aa": None}
    cnn = shared | {"opt": "sgd", "momentum": 0.9, "warmup_epochs": 3, "color_jitter": 0, "mixup": 0, "cutmix": 0}
    vit_mlp = shared | {"opt": "adamw", "lr": 5e-4, "weight_decay": 0.05, "sched": "cosine", "warmup_epochs": 20}
    vit_mlp |= {"warmup_lr": 5e-7, "clip_grad": 5.0, "color_jitter": 0.4, "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0}
    vit_mlp |= {"aa": "rand-m9-mstd0.5-inc1", "batch_size": 128, "epochs": 300}
    expected = {
        "cifar100/swin_t-resnet18": cnn
        | {"epochs": 300, "batch_size": 128, "lr": 0.05, "min_lr": 1e-3, "weight_decay": 2e-3, "sched": "cosine"},
        "cifar100/swin_t-resmlp_12": vit_mlp | {"min_lr": 1e-5, "model_ema": False},
        "imagenet/swin_t-resnet18": cnn
        | {"epochs": 100, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "sched": "step"}
        | {"decay_epochs": 30, "decay_rate": 0.1},
        "imagenet/swin_t-resmlp_12": vit_mlp | {"min_lr": 1e-6, "model_ema": True, "model_ema_decay": 0.99996},
    }
    for name, options in expected.items():
        recipe = read(name)
        assert {option: recipe[option] for option in options} == options, name


def random_images(number: int, classes: int) -> ImageArrays:
    images = np.random.default_rng(0).integers(256, size=(number, 40, 40, 3), dtype=np.uint8)
    return ImageArrays(images, np.arange(number) % classes, [str(name) for name in range(classes)])


@functools.cache
def teacher(name: str, num_classes: int, image_size: int, kwargs: str) -> nn.Module:
    """With random weights; shared by recipes with the same teacher."""
    return models.create_model(name, image_size=image_size, num_classes=num_classes, **yaml.safe_load(kwargs))


def load_teacher(name: str, checkpoint: None, num_classes: int, *, image_size: int, **kwargs: Any) -> nn.Module:
    return teacher(name, num_classes, image_size, yaml.safe_dump(kwargs))


def weights(distiller: Distiller) -> dict[str, Tensor]:
    parts = {"student": distiller.student.model, "projections": distiller.lfcc.student_projections}
    return {f"{part}.{name}": p.detach().clone() for part in parts for name, p in parts[part].named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two updates of `lfcc distill` on four random images each, with a random teacher."""
    classes = CLASSES[name.partition("/")[0]]
    of_teacher, of_student = (MODELS[model].channels for model in name.partition("/")[2].split("-"))
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor], Mapping[str, float]]] = []

    def fit(distiller: Distiller, *arguments: Any, **keywords: Any) -> dict[str, float]:
        before = weights(distiller)
        summary = loop.fit(distiller, *arguments, **keywords)
        seen.append((before, weights(distiller), summary))
        return summary

    monkeypatch.setattr(command, "fit", fit)
    monkeypatch.setattr(build, "load_teacher", load_teacher)
    monkeypatch.setattr(command, "open_split", lambda _, split: random_images(8 if split == "train" else 1, classes))
    monkeypatch.setattr(loop, "save_checkpoint", lambda *_: None)
    words = ["--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--device", "cpu"]
    command.distill(["-c", str(CONFIGS / f"{name}.yaml"), *words, "--output", str(tmp_path)])
    ((before, after, summary),) = seen
    assert summary["step"] == 2
    shapes = [tuple(weight.shape) for part, weight in after.items() if part.startswith("projections")]
    assert shapes == list(zip(of_teacher, of_student, strict=True))
    assert all(np.isfinite(summary[term]) and summary[term] > 0 for term in ("loss", "ce", "kd", "lfcc"))
    assert all(weight.isfinite().all() for weight in after.values())
    unchanged = [part for part in before if torch.equal(before[part], after[part])]
    # If the last norm of a residual branch starts at 0, its weights hardly change.
    assert len(unchanged) < len(before) / 10 and not any(part.startswith("projections") for part in unchanged)
