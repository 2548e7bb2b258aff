"""Two rows of next to nothing: what a call costs before it works. Inputs stay in cache."""

from functools import partial

import lfcc_kernels as lk
from benchmarks import peers
from benchmarks.cases.base import MODES, SCALES, TEMPERATURE, Case, features, rows


def cases(tiny: bool) -> list[Case]:
    calls = 20 if tiny else 200
    return [case for mode in MODES for case in (_lowpass(mode, calls), _info_nce(mode, calls))]


def _lowpass(mode: str, calls: int) -> Case:
    shape = (2, 8, 8, 8)
    candidates = {
        "ours": partial(lk.lowpass, scales=SCALES),
        "eager": partial(peers.pool_each_scale, scales=SCALES),
    }
    return Case("overhead", "lowpass", shape, mode, lambda: (features(shape, mode != "fwd"),), candidates, calls=calls)


def _info_nce(mode: str, calls: int) -> Case:
    shape = (2, 8)
    candidates = {
        "ours": partial(lk.info_nce, temperature=TEMPERATURE),
        "eager": partial(peers.contrast_dense, temperature=TEMPERATURE),
    }
    return Case("overhead", "info_nce", shape, mode, lambda: rows(shape, mode != "fwd"), candidates, calls=calls)
