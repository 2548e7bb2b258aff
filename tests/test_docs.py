"""Every Python snippet of the README and of docs/ runs, and trains what it says that it trains."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import in_ranks
from torch import Tensor

from lfcc_kernels import LFCCLoss

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that train an `LFCCLoss`, and the library that they need.
TRAINING = {
    "README": "timm",
    "timm": "timm",
    "lightning": "pytorch_lightning",
    "accelerate": "accelerate",
    "torchdistill": "torchdistill",
}


def run_page(page: Path) -> dict[str, Any]:
    """Run the snippets of a page one after the other, in one namespace. Errors name the line of the page."""
    text, names = page.read_text(), {"__name__": page.stem}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], page, "exec"), names)
    return names


def projections(lfcc: LFCCLoss) -> list[Tensor]:
    return [projection.weight.detach().clone() for projection in lfcc.student_projections]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run_and_train_every_projection(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(TRAINING.get(page.stem, "torch"))
    started: list[tuple[LFCCLoss, list[Tensor]]] = []
    create = LFCCLoss.__init__

    def create_and_note(self: LFCCLoss, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        started.append((self, projections(self)))

    monkeypatch.setattr(LFCCLoss, "__init__", create_and_note)
    monkeypatch.chdir(tmp_path)
    run_page(page)
    assert started or page.stem not in TRAINING
    for lfcc, before in started:
        for now, then in zip(projections(lfcc), before, strict=True):
            assert now.isfinite().all() and not torch.equal(now, then)


def train_with_accelerate() -> list[Tensor]:
    rank = str(torch.distributed.get_rank())
    # As its launcher does; nobody listens at the address, since the processes have met.
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    torch.manual_seed(int(rank))
    return projections(run_page(ROOT / "docs" / "accelerate.md")["lfcc"])


def test_ranks_of_accelerate_stay_together(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one, other = in_ranks(2, tmp_path, train_with_accelerate)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
