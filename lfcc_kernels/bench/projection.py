"""Memory and communication of the loss in one update of a large run, from formulas that the tests check on tensors.

    b  images of a batch on a rank            n = K b  images of an update on a rank
    K  batches of an update (--accum-steps)   N = W n  images of an update, the global batch
    W  ranks                                  D = cells * sum of the teacher's channels, values of an image's rows
    t  bytes of a teacher's value             w = values of one row, s * s * C_t of a stage and scale

The formulas leave out what has a few numbers a row (log-sum-exps, ids, norms) and what belongs to the models: feature
maps and their gradients. Times are not projected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lfcc_kernels.bench.cases.ofa import MODELS
from lfcc_kernels.filters import Learnable

FLOAT, INT = 4, 8  # bytes


@dataclass(frozen=True)
class Run:
    """One update of `lfcc distill` on one of its ranks, and what `LFCCLoss` takes there. Sizes are in bytes.

    Args:
        student_channels, teacher_channels: of each stage, as `LFCCLoss`.
        rows: b, images of a batch on a rank.
        ranks: W, those whose negatives are gathered.
        accum_steps: K.
        scales, direction: as `LFCCLoss`.
        teacher_bytes: t, 2 where all of the teacher's features are bfloat16 or float16, 4 where one stage is float32.
        ids: whether images have ids.
    """

    student_channels: tuple[int, ...]
    teacher_channels: tuple[int, ...]
    rows: int
    ranks: int = 1
    accum_steps: int = 1
    scales: tuple[int, ...] = (1, 2, 4)
    direction: str = "student_to_teacher"
    teacher_bytes: int = FLOAT
    ids: bool = False

    @property
    def own(self) -> int:
        """n = K b."""
        return self.accum_steps * self.rows

    @property
    def batch(self) -> int:
        """N = W n."""
        return self.ranks * self.own

    @property
    def cells(self) -> int:
        """Sum of s * s."""
        return sum(s * s for s in self.scales)

    @property
    def widths(self) -> list[int]:
        """w of every pair of student and teacher rows, stage after stage: s * s * C_t."""
        return [s * s * channels for channels in self.teacher_channels for s in self.scales]

    @property
    def width(self) -> int:
        """D, the sum of w."""
        return sum(self.widths)

    # What lies in memory.

    @property
    def parameters(self) -> int:
        """Numbers that learn: of the projections C_s C_t a stage, of the filters 2 * 8 * (sum of s) a stage."""
        projections = sum(s * t for s, t in zip(self.student_channels, self.teacher_channels, strict=True))
        return projections + len(self.student_channels) * 2 * Learnable.TAPS * sum(self.scales)

    @property
    def student_pyramids(self) -> int:
        """4 n D, of the student's rows in float32."""
        return FLOAT * self.own * self.width

    @property
    def student_cells(self) -> int:
        """4 b cells (sum of C_s), of the pooled cells that a batch's projections keep for their gradient."""
        return FLOAT * self.rows * self.cells * sum(self.student_channels)

    @property
    def teacher_pyramids(self) -> int:
        """t n D, of the rank's own teacher rows, and where t = 2 another 4 n D in float32."""
        raised = FLOAT if self.teacher_bytes < FLOAT else 0
        return (self.teacher_bytes + raised) * self.own * self.width

    @property
    def gathered(self) -> int:
        """t N D of the teacher's rows of all ranks (4 N D with K > 1, where they are raised before they travel).

        teacher_to_student gathers the student's in their place, 4 N D, symmetric both.
        """
        return sum(self._gathers) * self.batch * self.width

    @property
    def raised_keys(self) -> int:
        """4 N D, of the gathered teacher rows once more in float32, where they came in two bytes; else 0."""
        return FLOAT * self.batch * self.width * (2 in self._gathers)

    @property
    def row_gradients(self) -> int:
        """4 n D: the gradient of the rank's rows comes with their loss.

        0 for teacher_to_student, and for symmetric on one rank, where it is computed in the backward pass.
        """
        return self.student_pyramids if 4 in self._flops_of_ways else 0

    @property
    def joined(self) -> int:
        """(4 + t) n D with K > 1, of the batches' rows put together as one batch; else 0."""
        return (FLOAT + self.teacher_bytes) * self.own * self.width * (self.accum_steps > 1)

    @property
    def message(self) -> int:
        """t n D, of the rank's rows side by side while they travel, as many bytes a value as of those `gathered`."""
        return max(self._gathers, default=0) * self.own * self.width

    @property
    def contrast(self) -> int:
        """The sum of the above but for parameters and message: what is alive when all pairs have their loss.

        The backward pass then adds at most 8 n D, or `gathered_gradient`, and frees as it goes. With K > 1 there are
        no `student_cells`, since the contrast follows a pass without gradients.
        """
        cells = self.student_cells if self.accum_steps == 1 else 0
        own = self.student_pyramids + self.teacher_pyramids + self.row_gradients + self.joined
        return self.gathered + self.raised_keys + own + cells

    @property
    def gathered_gradient(self) -> int:
        """4 N D, of the gradient of all ranks' student rows before it is summed; 0 for student_to_teacher."""
        return FLOAT * self.batch * self.width if self._scattered else 0

    @property
    def cached_gradients(self) -> int:
        """4 n D with K > 1, from the contrast to the end of the update; else 0."""
        return self.student_pyramids if self.accum_steps > 1 else 0

    def workspace(self, chunk: int = 32 << 20) -> int:
        """What the Triton kernels take beside, at most: 4 (N + 2 n) (w + w') + 2 chunk.

        The widest pair's rows packed and their sums, with those of the pair before it (w'), which is freed a moment
        later; and products and weights of a chunk of rows. `chunk` is 20 MiB on sm_80, 32 on sm_90, 64 on sm_100.
        The CPU's kernels take less than 32 MiB.
        """
        widest = max(w + before for before, w in pairwise([0, *self.widths]))
        return FLOAT * (self.batch + 2 * self.own) * widest + 2 * chunk

    @property
    def logits(self) -> int:
        """4 n N a pair, of the similarities that a contrast by plain products keeps for its backward pass.

        They are not held here.
        """
        return FLOAT * self.own * self.batch * len(self.widths)

    # What travels. A rank receives this much, and sends as much where ranks form a ring.

    @property
    def rows_received(self) -> int:
        """(W - 1) / W of what is `gathered`."""
        return self.gathered * (self.ranks - 1) // self.ranks

    @property
    def gradient_received(self) -> int:
        """(W - 1) / W of `gathered_gradient`, of a reduce-scatter."""
        return self.gathered_gradient * (self.ranks - 1) // self.ranks

    @property
    def ids_received(self) -> int:
        """8 (W - 1) n a gather, where images have ids."""
        return INT * (self.ranks - 1) * self.own * len(self._gathers) * self.ids

    @property
    def headers_received(self) -> int:
        """32 (W - 1) a gather, of rows or of ids: in it ranks tell each other what they bring."""
        return 4 * INT * (self.ranks - 1) * len(self._gathers) * (1 + self.ids)

    @property
    def received(self) -> int:
        """All that the loss makes a rank receive."""
        return self.rows_received + self.gradient_received + self.ids_received + self.headers_received

    def gradients_received(self, student_parameters: int) -> int:
        """2 (W - 1) / W * 4 * parameters: DDP's all-reduce of all that learns, for comparison."""
        return 2 * (self.ranks - 1) * FLOAT * (student_parameters + self.parameters) // self.ranks

    # What is computed.

    @property
    def flops(self) -> int:
        """4 n N D; 6 for teacher_to_student, whose gradient takes a second pass; symmetric 6, on several ranks 10."""
        return sum(self._flops_of_ways) * self.own * self.batch * self.width

    @property
    def _flops_of_ways(self) -> tuple[int, ...]:
        """FLOPs a pair of values, of every contrast that is made."""
        if self.direction == "student_to_teacher":
            return (4,)
        return (4, 6) if self.direction == "symmetric" and self.ranks > 1 else (6,)

    @property
    def _scattered(self) -> bool:
        return self.ranks > 1 and self.direction != "student_to_teacher"

    @property
    def _gathers(self) -> tuple[int, ...]:
        """Bytes of a value in every gather of rows."""
        of_teacher = (self.teacher_bytes if self.accum_steps == 1 else FLOAT,)
        of_both = {"student_to_teacher": of_teacher, "teacher_to_student": (FLOAT,), "symmetric": (*of_teacher, FLOAT)}
        return () if self.ranks == 1 else of_both[self.direction]


ROWS_AT_MOST = 1024  # images of a batch on a GPU in the tables

# Student, teacher, bytes of the teacher's values under bfloat16 autocast on a GPU, parameters of the student.
PAIRS = (
    ("resnet18", "swin_t", 4, 11_689_512),
    ("deit_t", "convnext_t", 4, 5_717_416),
    ("resmlp_12", "resnet50", 2, 15_350_872),
)


def images(scales: Sequence[tuple[int, ...]] = ((1, 2, 4), (1, 2, 4, 7))) -> str:
    """A markdown table of what an image brings, for each of `PAIRS` and of `scales`."""
    lines = []
    for student, teacher, teacher_bytes, _ in PAIRS:
        for some in scales:
            run = _planned(student, teacher, teacher_bytes, 65536, 64, some)
            lines.append({
                "student under teacher": f"{student} under {teacher}",
                "scales": " ".join(map(str, some)),
                "values of an image, D": f"{run.width:,}",
                "t": str(teacher_bytes),
                "received for an image": _size(teacher_bytes * run.width),
                "GFLOP against 65,536 images": f"{run.flops / run.own / 1e9:.1f}",
                "parameters of the loss": f"{run.parameters:,}",
            })  # fmt: skip
    return _markdown(lines)


def runs(
    batches: Sequence[int] = (1024, 8192, 65536),
    ranks: Sequence[int] = (1, 8, 64),
    scales: tuple[int, ...] = (1, 2, 4),
) -> str:
    """A markdown table of the `Run` for each of `PAIRS`, of global batches and of GPUs.

    K is the least for which a GPU has no more than 1,024 images in a batch.
    """
    lines = []
    for student, teacher, teacher_bytes, parameters in PAIRS:
        for batch in batches:
            for gpus in ranks:
                run = _planned(student, teacher, teacher_bytes, batch, gpus, scales)
                lines.append({
                    "student under teacher": f"{student} under {teacher}",
                    "global batch": f"{batch:,}",
                    "GPUs": str(gpus),
                    "b x K": f"{run.rows} x {run.accum_steps}",
                    "contrast": _size(run.contrast),
                    "of it keys of all ranks": _size(run.gathered + run.raised_keys),
                    "kernels beside": _size(run.workspace()),
                    "logits not held": _size(run.logits),
                    "received": _size(run.received),
                    "DDP's gradients": _size(run.gradients_received(parameters)),
                    "TFLOP": f"{float(f'{run.flops / 1e12:.3g}'):,g}",
                })  # fmt: skip
    return _markdown(lines)


def _planned(student: str, teacher: str, teacher_bytes: int, batch: int, ranks: int, scales: tuple[int, ...]) -> Run:
    own = batch // ranks
    rows = min(own, ROWS_AT_MOST)
    channels = MODELS[student].channels, MODELS[teacher].channels
    return Run(*channels, rows, ranks, own // rows, scales, teacher_bytes=teacher_bytes)


def _markdown(lines: Sequence[dict[str, str]]) -> str:
    cells = [lines[0].keys(), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _size(size: int) -> str:
    unit, name = next((unit, name) for unit, name in _UNITS if size >= unit)
    return f"{size / unit:.3g} {name}".strip() if size else "0"


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, ""))
