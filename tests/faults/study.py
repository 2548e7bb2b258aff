"""Mutation study: plants each fault of faults.toml and runs the tests of the default lane that must notice it.

    python tests/faults/study.py [NAME ...]

Works in a copy of the tree, build/faults/tree, and never edits the checkout. For each fault: replace the text, rebuild
what depends on it, run the selected tests until the first failure, restore. Before that, the selection must pass
without the fault. The outcome goes to the table of tests/faults/README.md after every fault. An interrupted study goes
on where it stopped if the tree is still the same; named faults always run. The exit code is 1 if a fault survives.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
README = HERE / "README.md"
WORK = ROOT / "build" / "faults"
TREE, HEALTHY_BUILD, STATE = WORK / "tree", WORK / "healthy", WORK / "state.json"
TIMEOUT = 3600  # seconds for one selection
# pytest without the random slice of the grids: what the slice kills would depend on the commit.
PYTEST = "import sys, grids, pytest; grids.SLICE = 0; sys.exit(pytest.main(sys.argv[1:]))"
SURVIVED = "**survived**"


class NoResult(Exception):
    """A run that tells nothing about a fault."""


@dataclass(frozen=True)
class Fault:
    """A mistake in one file. `tests` are arguments of pytest that select where it must show."""

    name: str
    what: str
    file: str
    find: str
    replace: str
    tests: str

    def plant(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError unless the text to replace occurs exactly once."""
        if (count := text.count(self.find)) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.find!r} {count} times, expected once")
        return text.replace(self.find, self.replace)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def in_compiled_library(self) -> bool:
        """Whether `_C` must be rebuilt. The emulator's library of the CUDA kernels rebuilds itself."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


def load_faults() -> dict[str, Fault]:
    tables = tomllib.loads((HERE / "faults.toml").read_text())
    return {name: Fault(name, **fields) for name, fields in tables.items()}


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    file: str
    killed_by: str
    seconds: str

    @property
    def killed(self) -> bool:
        return not self.killed_by.startswith("**")

    def __str__(self) -> str:
        return f"| {self.name} | {self.file} | {self.killed_by} | {self.seconds} |"


HEAD = "| fault | file | killed by | seconds |"


def read_table() -> dict[str, Row]:
    _, _, rows = README.read_text().partition(HEAD)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows.splitlines()[2:] if line]
    return {row[0]: Row(*row) for row in cells}


def write_table(rows: dict[str, Row]) -> None:
    """Replaces the table, which ends the file, in one step."""
    text, _, _ = README.read_text().partition(HEAD)
    table = [HEAD, "|---|---|---|---|", *(str(rows[name]) for name in load_faults() if name in rows)]
    temporary = README.with_suffix(".tmp")
    temporary.write_text(text + "\n".join(table) + "\n")
    temporary.replace(README)


def update_copy() -> str:
    """Brings the copy to the state of the checkout, and returns a digest of it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = sorted(name for name in names if name and (ROOT / name).is_file())
    digest = hashlib.sha256()
    for name in files:
        content = (ROOT / name).read_bytes()
        if Path(name).parent != Path("tests/faults"):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        target = TREE / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    manifest = WORK / "files.json"
    for name in set(json.loads(manifest.read_text()) if manifest.exists() else []) - set(files):
        (TREE / name).unlink(missing_ok=True)
    manifest.write_text(json.dumps(files))
    return digest.hexdigest()


def build() -> None:
    """Compiles what changed of `_C`, in place."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    ran = subprocess.run(
        command, cwd=TREE, env=os.environ | {"LFCC_BUILD_CUDA": "0"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if ran.returncode:
        (WORK / "build.log").write_text(ran.stdout)
        raise NoResult(f"the build fails, see {WORK / 'build.log'}")


def build_outputs() -> list[Path]:
    return [*TREE.glob("build/objects-*"), *TREE.glob("lfcc_kernels/*.so")]


def keep_healthy_build() -> None:
    shutil.rmtree(HEALTHY_BUILD, ignore_errors=True)
    for path in build_outputs():
        target = HEALTHY_BUILD / path.relative_to(TREE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)


def restore_healthy_build() -> None:
    """Objects with their times, so that ninja compiles nothing again."""
    for path in build_outputs():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(HEALTHY_BUILD, TREE, dirs_exist_ok=True)


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The copy with a fault and built, restored afterwards."""
    path = TREE / fault.file
    text, times = path.read_text(), path.stat()
    try:
        path.write_text(fault.plant(text))
        if fault.in_compiled_library:
            build()
        yield
    finally:
        path.write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if fault.in_compiled_library:
            restore_healthy_build()


def run_tests(fault: Fault) -> str:
    """The first failing test of the fault's selection, or an empty string if all pass."""
    environment = os.environ | {"PYTHONPATH": f"{TREE}:{TREE / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    if fault.in_compiled_library:  # without a compiler there is no emulator, which would recompile for any header
        environment["CXX"] = "none"
    options = ["-x", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    command = [sys.executable, "-c", PYTEST, *options, *shlex.split(fault.tests)]
    try:
        ran = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise NoResult(f"pytest {fault.tests} takes more than {TIMEOUT} s") from None
    (WORK / f"{fault.name}.log").write_text(ran.stdout + ran.stderr)
    if ran.returncode < 0:  # faulthandler prints the stack
        crashed = re.findall(r"in (test_\w+)", ran.stderr)
        return f"{shlex.split(fault.tests)[0]}::{crashed[0] if crashed else '?'} (signal {-ran.returncode})"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", ran.stdout, re.M)
    if ran.returncode not in (0, 1) or (ran.returncode == 1) != bool(failed):
        raise NoResult(f"pytest {fault.tests} exits with {ran.returncode}")
    return failed[1] if failed else ""


def outcome(fault: Fault, state: dict) -> str:
    """The test that kills the fault, or why there is none."""
    selection = f"{fault.tests} {fault.in_compiled_library}"
    try:
        if selection not in state["passing"]:
            if failed := run_tests(fault):
                raise NoResult(f"{failed} fails without the fault")
            state["passing"].append(selection)
        with planted(fault):
            return run_tests(fault).removeprefix("tests/").replace("|", "\\|") or SURVIVED
    except NoResult as problem:
        return f"**no result**: {problem}"


def study(faults: Sequence[Fault], state: dict) -> None:
    """Runs the faults and records each outcome."""
    rows = read_table()
    for fault in faults:
        start = time.perf_counter()
        row = Row(fault.name, fault.file, outcome(fault, state), f"{time.perf_counter() - start:.0f}")
        print(f"{fault.name}: {row.killed_by}, {row.seconds} s", flush=True)
        rows[fault.name] = row
        write_table(rows)
        if row.killed:
            state["done"][fault.name] = fault.digest
        STATE.write_text(json.dumps(state))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to run (default: those without a result)")
    names, faults = parser.parse_args().names, load_faults()
    if unknown := set(names) - faults.keys():
        parser.error(f"unknown faults {', '.join(sorted(unknown))}; see tests/faults/faults.toml")
    WORK.mkdir(parents=True, exist_ok=True)
    digest = update_copy()
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    if state.get("tree") != digest:
        state = {"tree": digest, "passing": [], "done": {}}
        build()
        keep_healthy_build()
        STATE.write_text(json.dumps(state))
    else:
        restore_healthy_build()  # the last study may have ended inside a fault
    study([faults[name] for name in names or faults if names or state["done"].get(name) != faults[name].digest], state)
    killed = [row.name for row in read_table().values() if row.name in faults and row.killed]
    left = [name for name in faults if name not in killed]
    print(f"{len(killed)} of {len(faults)} faults are killed", *left, sep="\n  not ")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
