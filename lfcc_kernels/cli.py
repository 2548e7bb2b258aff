"""The command line `lfcc`. User errors print one line to stderr; the exit code is 1."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_COMMANDS = {
    "info": "print versions, backends and build, with the reason if a backend is missing",
    "inspect": "list the taps of a timm model: channels, grids, prefix tokens",
    "cache": "store a teacher's outputs for a data set, so that runs of distill need not load the teacher",
    "distill": "train a student with a teacher",
    "bench": "benchmark the kernels and the loss against other implementations",
    "report": "write an HTML page with tables and plots of run folders, or of a record of bench",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `lfcc` command. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lfcc_kernels"):
            raise
        return _fail(f"{error.name} is not installed; run pip install 'lfcc-kernels[train,data,report,bench]'")
    except (OSError, ValueError, FloatingPointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _run(argv: list[str]) -> int:
    # Each command imports its own libraries, so `lfcc info` needs torch only.
    if argv[:1] == ["distill"]:
        from lfcc_kernels.distill.command import distill

        distill(argv[1:])
        return 0
    if argv[:1] == ["cache"]:
        from lfcc_kernels.distill.cache_command import cache

        cache(argv[1:])
        return 0
    if argv[:1] == ["bench"]:
        from lfcc_kernels.bench.command import bench

        return bench(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        from lfcc_kernels.info import report

        print(report())
    elif args.command == "inspect":
        from lfcc_kernels.distill.models import inspect_model

        print(inspect_model(args.model, args.img_size))
    elif args.command == "report":
        _report([Path(source) for source in args.source], args.output)
    return 0


def _report(sources: list[Path], output: str) -> None:
    records = [source for source in sources if source.suffix == ".json"]
    if not records:
        from lfcc_kernels.distill.report import write_report

        write_report(sources, output)
    elif len(sources) == 1:
        from lfcc_kernels.bench.report import write_report as write_bench_report

        write_bench_report(sources[0], output)
    else:
        raise ValueError(f"report: got {', '.join(map(str, sources))}; expected one record of bench, or run folders")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lfcc", description="Low-frequency contrastive distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    add["inspect"].add_argument("model", help="name of a timm model")
    add["inspect"].add_argument("--img-size", type=int, metavar="PX", help="image size (default: the model's own)")
    add["report"].add_argument("source", nargs="+", help="run folders, or the JSON file of a record")
    add["report"].add_argument("-o", "--output", default="report", help="folder of the page (default: %(default)s)")
    return parser


def _fail(message: str, code: int = 1) -> int:
    print(f"lfcc: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
