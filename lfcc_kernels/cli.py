"""The command line `lfcc`. A mistake of the user ends in one line on stderr and exit code 1."""

import argparse
import sys
from collections.abc import Sequence

_COMMANDS = {
    "info": "what is built, what is available, and why not",
    "inspect": "taps of a timm model: widths, grids, prefix tokens",
    "distill": "train a student with a teacher",
    "report": "a page of tables and curves from run folders",
    "bench": "measure the Triton kernels' tiles on this GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `lfcc` command. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lfcc_kernels"):
            raise
        return _fail(f"{error.name} is not installed; pip install 'lfcc-kernels[train,report]' brings what is missing")
    except (OSError, ValueError, FloatingPointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    return 0


def _run(argv: list[str]) -> None:
    # The libraries behind a command are imported with it, so that `lfcc info` needs torch alone.
    if argv[:1] == ["distill"]:
        from lfcc_kernels.distill.command import distill

        return distill(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        from lfcc_kernels.info import report

        print(report())
    elif args.command == "inspect":
        from lfcc_kernels.distill.command import inspect_model

        print(inspect_model(args.model, args.img_size))
    elif args.command == "report":
        from lfcc_kernels.distill.report import write_report

        write_report(args.run, args.output)
    elif args.command == "bench":
        if not args.tune:
            parser.error("bench: --tune is what there is for now; `make bench` or `python -m benchmarks` measures")
        from lfcc_kernels.backends.triton.tuning import tune

        tune(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lfcc", description="Low-frequency contrastive distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: commands.add_parser(name, help=text, description=text) for name, text in _COMMANDS.items()}
    add["inspect"].add_argument("model", help="name of a timm model")
    add["inspect"].add_argument("--img-size", type=int, metavar="PX", help="side of the images")
    add["report"].add_argument("run", nargs="+", help="run folder")
    add["report"].add_argument("-o", "--output", default="report", help="folder for the page (%(default)s)")
    tune = "time tiles and crossovers on this GPU and write its table; a few minutes, and again goes on from there"
    add["bench"].add_argument("--tune", action="store_true", help=tune)
    add["bench"].add_argument("-o", "--output", metavar="FILE", help="table to write (the package's own for this GPU)")
    return parser


def _fail(message: str, code: int = 1) -> int:
    print(f"lfcc: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
