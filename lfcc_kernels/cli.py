"""The command line `lfcc`. A mistake of the user ends in one line on stderr and exit code 1."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_COMMANDS = {
    "info": "what is built, what is available, and why not",
    "inspect": "taps of a timm model: widths, grids, prefix tokens",
    "cache": "keep what a teacher says of a data set, for runs of distill that then do not load it",
    "distill": "train a student with a teacher",
    "bench": "measure the kernels and the loss against their peers",
    "report": "a page of tables and pictures from run folders, or from a record of bench",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `lfcc` command. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lfcc_kernels"):
            raise
        return _fail(
            f"{error.name} is not installed; pip install 'lfcc-kernels[train,data,report,bench]' brings what is missing"
        )
    except (OSError, ValueError, FloatingPointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _run(argv: list[str]) -> int:
    # The libraries behind a command are imported with it, so that `lfcc info` needs torch alone.
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
        raise ValueError(f"report: one record of bench, or run folders; got {', '.join(map(str, sources))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lfcc", description="Low-frequency contrastive distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    add["inspect"].add_argument("model", help="name of a timm model")
    add["inspect"].add_argument("--img-size", type=int, metavar="PX", help="side of the images")
    add["report"].add_argument("source", nargs="+", help="run folder, or the JSON file of a record")
    add["report"].add_argument("-o", "--output", default="report", help="folder for the page (%(default)s)")
    return parser


def _fail(message: str, code: int = 1) -> int:
    print(f"lfcc: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
