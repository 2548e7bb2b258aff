"""README, docs/ and CONTRIBUTING: snippets run and train what they claim to train, links and paths exist, the API page
is complete."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import in_ranks
from torch import Tensor

import lfcc_kernels
from lfcc_kernels import LFCCLoss

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "tests/faults/README.md")]
SNIPPETS = [page for page in PAGES if "```python\n" in page.read_text()]
# Pages that train an `LFCCLoss`, and the library that they need.
TRAINING = {
    "README": "timm",
    "timm": "timm",
    "lightning": "pytorch_lightning",
    "accelerate": "accelerate",
    "torchdistill": "torchdistill",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path) -> dict[str, Any]:
    """Run the snippets of a page in order, in one namespace. Errors refer to the line of the page."""
    text, names = page.read_text(), {"__name__": page.stem}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], page, "exec"), names)
    return names


def projections(lfcc: LFCCLoss) -> list[Tensor]:
    return [projection.weight.detach().clone() for projection in lfcc.student_projections]


SLOW = ("accelerate", "lightning", "torchdistill")  # import large frameworks


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW), id=page.stem) for page in SNIPPETS]
)
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
    if page.stem not in TRAINING:
        return
    assert started
    for lfcc, before in started:
        for now, then in zip(projections(lfcc), before, strict=True):
            assert now.isfinite().all() and not torch.equal(now, then)


def train_with_accelerate() -> list[Tensor]:
    rank = str(torch.distributed.get_rank())
    # As Accelerate's launcher sets them. The address is not used: the processes are already connected.
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    torch.manual_seed(int(rank))
    return projections(run_page(ROOT / "docs" / "accelerate.md")["lfcc"])


@pytest.mark.slow
def test_ranks_of_accelerate_stay_together(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one, other = in_ranks(2, tmp_path, train_with_accelerate)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", without_code(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_paths_in_text_exist(page: Path) -> None:
    """`lfcc_kernels/...`, `tests/...` and the like in backticks."""
    tops = "benchmarks|configs|csrc|docs|examples|lfcc_kernels|tests"
    for path in re.findall(rf"`((?:{tops})/[\w./+-]*)`", page.read_text()):
        assert (ROOT / path).exists() or path.endswith(".so"), f"{path} does not exist"


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs both make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def documented(package: str) -> set[str]:
    """Names of a package that docs/api.md generates from docstrings."""
    page = (ROOT / "docs" / "api.md").read_text()
    return set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", page, re.MULTILINE))


def test_api_page_has_every_public_name() -> None:
    assert documented("lfcc_kernels") | {"__version__"} == set(lfcc_kernels.__all__)


def test_api_page_has_every_public_name_of_the_loop() -> None:
    pytest.importorskip("timm")
    from lfcc_kernels import distill

    assert documented("lfcc_kernels.distill") == set(distill.__all__)


def test_readme_lists_every_public_function_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in lfcc_kernels.__all__ if f"`{name}`](docs/api.md#" not in readme]
    assert missing == ["__version__"]
    assert len(readme.splitlines()) <= 150
