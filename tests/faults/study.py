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
TIMEOUT = 1200  # seconds for one selection
SURVIVED = "**survived**"


@dataclass(frozen=True)
class Fault:
    """A line of code as a mistake would leave it. `tests` are arguments of pytest that select where it must show."""

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
        raise RuntimeError(f"the build failed:\n{ran.stdout[-4000:]}")


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


def run_tests(fault: Fault) -> tuple[int, str]:
    """Exit code and first failing test of the fault's selection."""
    environment = os.environ | {"PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    if fault.in_compiled_library:  # without a compiler there is no emulator, which would recompile for any header
        environment["CXX"] = "none"
    options = ["-x", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(fault.tests)]
    try:
        ran = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{fault.name}: {fault.tests} takes more than {TIMEOUT} s") from None
    (WORK / "last.log").write_text(ran.stdout + ran.stderr)
    if ran.returncode < 0:  # faulthandler prints the stack
        crashed = re.findall(r"in (test_\w+)", ran.stderr)
        return 1, f"{shlex.split(fault.tests)[0]}::{crashed[0] if crashed else '?'} (signal {-ran.returncode})"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", ran.stdout, re.M)
    return ran.returncode, failed[1] if failed else ""


def study(faults: Sequence[Fault], state: dict) -> None:
    """Runs the faults and records each outcome."""
    rows = read_table()
    for fault in faults:
        key = f"{fault.tests} {fault.in_compiled_library}"
        if key not in state["passing"]:
            code, failed = run_tests(fault)
            if code:
                log = (WORK / "last.log").read_text()
                raise RuntimeError(f"without a fault, pytest {fault.tests} exits with {code} {failed}\n{log[-3000:]}")
            state["passing"].append(key)
            STATE.write_text(json.dumps(state))
        start = time.perf_counter()
        with planted(fault):
            code, failed = run_tests(fault)
        if code not in (0, 1) or (code and not failed):
            raise RuntimeError(f"{fault.name}: pytest exits with {code}\n{(WORK / 'last.log').read_text()[-3000:]}")
        killer = failed.removeprefix("tests/").replace("|", "\\|") if code else SURVIVED
        seconds = time.perf_counter() - start
        print(f"{fault.name}: {killer}, {seconds:.0f} s", flush=True)
        rows[fault.name] = Row(fault.name, fault.file, killer, f"{seconds:.0f}")
        write_table(rows)
        state["done"][fault.name] = hashlib.sha256(repr(fault).encode()).hexdigest()
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
    done = {name for name, fault in faults.items()
            if state["done"].get(name) == hashlib.sha256(repr(fault).encode()).hexdigest()}  # fmt: skip
    study([faults[name] for name in names or faults if names or name not in done], state)
    rows = [row for row in read_table().values() if row.name in faults]
    survivors = [row.name for row in rows if row.killed_by == SURVIVED]
    print(
        f"{len(faults)} faults, {len(rows) - len(survivors)} killed, {len(survivors)} survived", *survivors, sep="\n  "
    )
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
