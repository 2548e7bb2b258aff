"""Cost model of the LFCC loss: memory, communication and FLOPs of one update of a large run, without running it.

    b  images of a batch on a rank            n = K b  images of an update on a rank
    K  batches of an update (--accum-steps)   N = W n  images of an update, the global batch
    W  ranks                                  D = cells * sum of the teacher's channels, values per image
    t  bytes per teacher value                w = values per row of one stage and scale, s * s * C_t

The formulas leave out tensors with a few values per row (log-sum-exps, ids, norms) and everything that belongs to the
models: feature maps and their gradients. Times are not modelled. The tests compare each formula with real tensors;
docs/scale.md explains the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lfcc_kernels.bench.ofa import MODELS
from lfcc_kernels.bench.tables import markdown_table
from lfcc_kernels.filters import Learnable

FLOAT, INT = 4, 8  # bytes


@dataclass(frozen=True)
class Run:
    """One update of `lfcc distill` on one of its ranks, and the cost of `LFCCLoss` in it. Sizes are in bytes.

    Args:
        student_channels, teacher_channels: per stage, as for `LFCCLoss`.
        rows: b, images of a batch on a rank.
        ranks: W, the ranks that exchange negatives.
        accum_steps: K.
        scales, direction: as for `LFCCLoss`.
        teacher_bytes: t, 2 if all teacher features are bfloat16 or float16, 4 if any stage is float32.
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
    def local_batch(self) -> int:
        """n = K b."""
        return self.accum_steps * self.rows

    @property
    def batch(self) -> int:
        """N = W n."""
        return self.ranks * self.local_batch

    @property
    def cells(self) -> int:
        """Sum of s * s."""
        return sum(s * s for s in self.scales)

    @property
    def widths(self) -> list[int]:
        """w of every pair of student and teacher rows, stage by stage: s * s * C_t."""
        return [s * s * channels for channels in self.teacher_channels for s in self.scales]

    @property
    def width(self) -> int:
        """D, the sum of w."""
        return sum(self.widths)

    # Memory.

    @property
    def parameters(self) -> int:
        """Trainable parameters, per stage: C_s C_t of the projection and 2 * 8 * (sum of s) of the filters."""
        projections = sum(s * t for s, t in zip(self.student_channels, self.teacher_channels, strict=True))
        return projections + len(self.student_channels) * 2 * Learnable.TAPS * sum(self.scales)

    @property
    def student_pyramids(self) -> int:
        """4 n D: the student's rows in float32."""
        return FLOAT * self.local_batch * self.width

    @property
    def student_cells(self) -> int:
        """4 b cells (sum of C_s): the pooled cells of a batch, saved for the gradient of the projections."""
        return FLOAT * self.rows * self.cells * sum(self.student_channels)

    @property
    def teacher_pyramids(self) -> int:
        """t n D: the rank's own teacher rows; if t = 2, another 4 n D for their float32 copy."""
        upcast = FLOAT if self.teacher_bytes < FLOAT else 0
        return (self.teacher_bytes + upcast) * self.local_batch * self.width

    @property
    def gathered(self) -> int:
        """t N D: the teacher's rows of all ranks (4 N D if K > 1, because they are converted to float32 first).

        teacher_to_student gathers the student's rows instead, 4 N D; symmetric gathers both.
        """
        return sum(self._gathers) * self.batch * self.width

    @property
    def upcast_keys(self) -> int:
        """4 N D: the float32 copy of the gathered teacher rows if they were sent in 16 bits, otherwise 0."""
        return FLOAT * self.batch * self.width * (2 in self._gathers)

    @property
    def row_gradients(self) -> int:
        """4 n D: the gradient of the rank's rows, computed together with their loss.

        0 for teacher_to_student, and for symmetric on one rank, which compute it in the backward pass.
        """
        return self.student_pyramids if 4 in self._flops_per_contrast else 0

    @property
    def concatenated(self) -> int:
        """(4 + t) n D if K > 1: the rows of the K batches concatenated to one batch; otherwise 0."""
        return (FLOAT + self.teacher_bytes) * self.local_batch * self.width * (self.accum_steps > 1)

    @property
    def message(self) -> int:
        """t n D: the send buffer of the rank's rows, with as many bytes per value as `gathered`."""
        return max(self._gathers, default=0) * self.local_batch * self.width

    @property
    def contrast(self) -> int:
        """Sum of the above except parameters and message: the memory in use once all pairs have their loss.

        The backward pass then adds at most 8 n D, or `gathered_gradient`, and frees memory as it proceeds. With K > 1
        there are no `student_cells`, because the contrast follows a pass without gradients.
        """
        cells = self.student_cells if self.accum_steps == 1 else 0
        own = self.student_pyramids + self.teacher_pyramids + self.row_gradients + self.concatenated
        return self.gathered + self.upcast_keys + own + cells

    @property
    def gathered_gradient(self) -> int:
        """4 N D: the gradient of all ranks' student rows before it is summed; 0 for student_to_teacher."""
        return FLOAT * self.batch * self.width if self._scattered else 0

    @property
    def cached_gradients(self) -> int:
        """4 n D if K > 1, from the contrast to the end of the update; otherwise 0."""
        return self.student_pyramids if self.accum_steps > 1 else 0

    def workspace(self, chunk: int = 32 << 20) -> int:
        """Upper bound of the Triton kernels' workspace: 4 (N + 2 n) (w + w') + 2 chunk.

        The packed rows and sums of the widest pair and of the pair before it (w'), which is freed slightly later, plus
        logits and weights of a chunk of rows. `chunk` is 20 MiB on sm_80, 32 on sm_90, 64 on sm_100. The CPU kernels
        need less than 32 MiB.
        """
        widest = max(w + before for before, w in pairwise([0, *self.widths]))
        return FLOAT * (self.batch + 2 * self.local_batch) * widest + 2 * chunk

    @property
    def logits(self) -> int:
        """4 n N per pair: the logits that a dense implementation saves for backward, and that are never stored here."""
        return FLOAT * self.local_batch * self.batch * len(self.widths)

    # Communication: bytes that a rank receives. In a ring it sends as many.

    @property
    def rows_received(self) -> int:
        """(W - 1) / W of `gathered`."""
        return self.gathered * (self.ranks - 1) // self.ranks

    @property
    def gradient_received(self) -> int:
        """(W - 1) / W of `gathered_gradient`, by a reduce-scatter."""
        return self.gathered_gradient * (self.ranks - 1) // self.ranks

    @property
    def ids_received(self) -> int:
        """8 (W - 1) n per gather, if images have ids."""
        return INT * (self.ranks - 1) * self.local_batch * len(self._gathers) * self.ids

    @property
    def headers_received(self) -> int:
        """32 (W - 1) per gather of rows or ids: the shapes that ranks compare before they gather."""
        return 4 * INT * (self.ranks - 1) * len(self._gathers) * (1 + self.ids)

    @property
    def received(self) -> int:
        """Everything that a rank receives for the loss."""
        return self.rows_received + self.gradient_received + self.ids_received + self.headers_received

    def gradients_received(self, student_parameters: int) -> int:
        """2 (W - 1) / W * 4 * parameters: DDP's all-reduce of all gradients, for comparison."""
        return 2 * (self.ranks - 1) * FLOAT * (student_parameters + self.parameters) // self.ranks

    # Arithmetic.

    @property
    def flops(self) -> int:
        """4 n N D; 6 n N D for teacher_to_student, whose gradient needs a second pass, and for symmetric; symmetric on
        several ranks 10 n N D."""
        return sum(self._flops_per_contrast) * self.local_batch * self.batch * self.width

    @property
    def _flops_per_contrast(self) -> tuple[int, ...]:
        """FLOPs per pair of values, for each contrast."""
        if self.direction == "student_to_teacher":
            return (4,)
        return (4, 6) if self.direction == "symmetric" and self.ranks > 1 else (6,)

    @property
    def _scattered(self) -> bool:
        return self.ranks > 1 and self.direction != "student_to_teacher"

    @property
    def _gathers(self) -> tuple[int, ...]:
        """Bytes per value of each gather of rows."""
        teacher = (self.teacher_bytes if self.accum_steps == 1 else FLOAT,)
        both = {"student_to_teacher": teacher, "teacher_to_student": (FLOAT,), "symmetric": (*teacher, FLOAT)}
        return () if self.ranks == 1 else both[self.direction]


MAX_ROWS = 1024  # images of a batch on a GPU in the tables

# Student, teacher, bytes per teacher value under bfloat16 autocast on a GPU, parameters of the student.
PAIRS = (
    ("resnet18", "swin_t", 4, 11_689_512),
    ("deit_t", "convnext_t", 4, 5_717_416),
    ("resmlp_12", "resnet50", 2, 15_350_872),
)


def cost_per_image(scales: Sequence[tuple[int, ...]] = ((1, 2, 4), (1, 2, 4, 7))) -> str:
    """A Markdown table of the cost per image, for each of `PAIRS` and of `scales`."""
    lines = []
    for student, teacher, teacher_bytes, _ in PAIRS:
        for some in scales:
            run = _planned(student, teacher, teacher_bytes, 65536, 64, some)
            lines.append({
                "student from teacher": f"{student} from {teacher}",
                "scales": " ".join(map(str, some)),
                "values per image, D": f"{run.width:,}",
                "t": str(teacher_bytes),
                "received per image": _size(teacher_bytes * run.width),
                "GFLOP against 65,536 images": f"{run.flops / run.local_batch / 1e9:.1f}",
                "parameters of the loss": f"{run.parameters:,}",
            })  # fmt: skip
    return markdown_table(lines)


def cost_per_run(
    batches: Sequence[int] = (1024, 8192, 65536), ranks: Sequence[int] = (1, 8, 64), scales: tuple[int, ...] = (1, 2, 4)
) -> str:
    """A Markdown table of the cost of a `Run` on one GPU, for each of `PAIRS`, of the global batches and of the GPUs.

    K is the smallest number for which a GPU has at most 1,024 images in a batch.
    """
    lines = []
    for student, teacher, teacher_bytes, parameters in PAIRS:
        for batch in batches:
            for gpus in ranks:
                run = _planned(student, teacher, teacher_bytes, batch, gpus, scales)
                lines.append({
                    "student from teacher": f"{student} from {teacher}",
                    "global batch": f"{batch:,}",
                    "GPUs": str(gpus),
                    "b x K": f"{run.rows} x {run.accum_steps}",
                    "contrast": _size(run.contrast),
                    "of which keys of all ranks": _size(run.gathered + run.upcast_keys),
                    "kernel workspace": _size(run.workspace()),
                    "logits (not stored)": _size(run.logits),
                    "received": _size(run.received),
                    "received by DDP": _size(run.gradients_received(parameters)),
                    "TFLOP": f"{float(f'{run.flops / 1e12:.3g}'):,g}",
                })  # fmt: skip
    return markdown_table(lines)


def _planned(student: str, teacher: str, teacher_bytes: int, batch: int, ranks: int, scales: tuple[int, ...]) -> Run:
    local_batch = batch // ranks
    rows = min(local_batch, MAX_ROWS)
    channels = MODELS[student].channels, MODELS[teacher].channels
    return Run(*channels, rows, ranks, local_batch // rows, scales, teacher_bytes=teacher_bytes)


def _size(size: int) -> str:
    unit, name = next((unit, name) for unit, name in _UNITS if size >= unit)
    return f"{size / unit:.3g} {name}".strip() if size else "0"


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, ""))
