"""Everything to run on a GPU machine, in one call of less than nine minutes and without a network: `make gpu`.

    python -m benchmarks.gpu [--quick] [--seconds 525] [--output FOLDER]
    python -m benchmarks.gpu --large              # `make gpu-70b`: no tests, and only the jobs of the 70B model
    python -m benchmarks.gpu --device cpu --toy   # the same path at tiny sizes

The package is built in place with the tools that the machine has; then the tests that need a GPU run, and the
benchmarks get the time that is left. Missing packages are reported, and the steps that need them are left out. The exit
code is 1 if the build, a test or a benchmark failed; a failure does not keep the later steps from running.
"""

import importlib.util
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

from benchmarks.environment import ROOT
from benchmarks.options import parse, parser
from benchmarks.processes import PATIENCE, run_within
from benchmarks.progress import Deadline, say

# Limits in seconds for the whole call and, within it, for the build and the tests; the benchmarks get the rest.
SECONDS, BUILD, TESTS = 525.0, 150.0, 170.0
# Seconds at the end of the tests' time in which pytest, once interrupted, reports what has failed and what was slow:
# pytest-xdist waits ten seconds for its workers.
_SHOWING = 15.0
# Seconds at the end of the benchmarks' time: _PASSING_ON to pass an interrupt on to the benchmark that is running, and
# before that _RESERVE for the benchmarks to finish by themselves.
_PASSING_ON, _RESERVE = PATIENCE + 2.0, 3.0
_BUILD_NEEDS = ("pip", "scikit_build_core", "pybind11")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, test and measure; return 1 if something failed, else 0."""
    made = parser(__doc__)
    made.add_argument("--large", action="store_true", help="run only the jobs of the 70B model, and no tests")
    made.set_defaults(device="cuda")
    options = parse(made, arguments)
    deadline = Deadline(SECONDS if options.seconds is None else options.seconds)
    # PYTHONPATH lets programs that tests start in other folders find the package even if it could not be installed.
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    succeeded = [_built(min(BUILD, deadline.left), environment)]
    if not options.large:
        succeeded.append(_tested(min(TESTS, deadline.left), options, environment))
    succeeded.append(_measured(deadline.left, options, environment))
    return 0 if all(succeeded) else 1


def missing(modules: Sequence[str]) -> list[str]:
    """Return the names of those modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _built(seconds: float, environment: dict[str, str]) -> bool:
    """Install the package in place, or else link the kernels into it; return False only if the build failed.

    Without the compiled extension, the C++ and CUDA ops cannot run; everything else can.
    """
    absent = missing(_BUILD_NEEDS)
    if absent:
        say(f"LEFT OUT: the C++ and CUDA ops, which cannot be built without {', '.join(absent)}")
        _link_kernels()
        return True
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    built = _succeeded("the build", [*command, "--editable", str(ROOT)], seconds, environment)
    if not built:
        _link_kernels()
    return built


def _link_kernels() -> None:
    """Make `gradprune.kernels` importable by a symbolic link, unless an installation already has."""
    link = ROOT / "gradprune" / "kernels"
    if missing(["gradprune.kernels"]) and not link.is_symlink():
        link.symlink_to(ROOT / "kernels")


def _tested(seconds: float, options: Namespace, environment: dict[str, str]) -> bool:
    """Run the tests marked gpu; a test whose packages are missing is skipped, or an error at collection."""
    if missing(["pytest"]):
        say("LEFT OUT: the tests, which cannot run without pytest")
        return True
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", "--durations", "10"]
    if missing(["xdist"]):
        say("the tests run one after the other, because pytest-xdist is not installed")
    else:
        command += ["--numprocesses", "8", "--dist", "worksteal"]
    # Toy runs usually have no GPU: all these tests are skipped then, and one file is enough to exercise this path.
    where = ["tests/kernels/test_sanitizer.py"] if options.toy else []
    return _succeeded("the tests", [*command, *where], seconds, environment, _SHOWING)


def _measured(seconds: float, options: Namespace, environment: dict[str, str]) -> bool:
    """Run the benchmarks meant for a GPU, within `seconds`."""
    command = [sys.executable, "-m", "benchmarks.run", "--device", options.device, "--steps_of", "cuda"]
    command += ["--output", str(options.output)]
    flags = [f"--{name}" for name in ("quick", "toy", "large") if getattr(options, name)]
    until = f"{time.monotonic() + seconds - _PASSING_ON - _RESERVE:.1f}"
    return _succeeded("the benchmarks", [*command, *flags, "--until", until], seconds, environment, _PASSING_ON)


def _succeeded(
    what: str, command: Sequence[str], seconds: float, environment: dict[str, str], patience: float = PATIENCE
) -> bool:
    say(f"{what}, at most {seconds:.0f} s: {' '.join(command[1:])}")
    code = run_within(command, seconds, environment, patience)
    if code != 0:
        say(f"{what}: " + (f"ended after {seconds:.0f} s" if code is None else f"failed with exit code {code}"))
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
