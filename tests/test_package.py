"""What is true of the package as a whole: what it ships, what importing it costs, what its README promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, timeout: float = 240) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- import -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Modules that ``import timm`` brings, and those that ``import vitzoo`` adds."""
    code = """
import json, sys
import timm
timm_has = set(sys.modules)
import vitzoo
print(json.dumps({"timm": sorted(timm_has), "vitzoo": sorted(set(sys.modules) - timm_has)}))
"""
    return json.loads(run_python(code).splitlines()[-1])


def test_importing_vitzoo_imports_no_package_that_timm_does_not(imported):
    known = {name.split(".")[0] for name in imported["timm"]} | set(sys.stdlib_module_names) | {"vitzoo", "tomli"}
    foreign = {name.split(".")[0] for name in imported["vitzoo"]} - known
    assert not foreign, f"import vitzoo also imports {sorted(foreign)}"


def test_importing_vitzoo_costs_few_modules_more_than_timm(imported):
    # a count stands for the time, which a shared machine does not measure: 1.1 times timm's
    assert len(imported["vitzoo"]) <= 0.1 * len(imported["timm"]), imported["vitzoo"]


def test_importing_vitzoo_imports_neither_lightning_nor_kernels(imported):
    heavy = [name for name in imported["vitzoo"] if name.split(".")[0] == "lightning" or ".triton." in name]
    assert not heavy


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_its_types_and_its_manifests_and_nothing_else(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vitzoo", "vitzoo_cli"}
    assert "vitzoo/py.typed" in names
    assert {f"vitzoo/weights/{path.name}" for path in (ROOT / "weights").iterdir()} <= set(names)


def test_the_changelog_names_the_version():
    import vitzoo

    assert version("vitzoo") == vitzoo.__version__ == PROJECT["project"]["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert vitzoo.__version__ in headings[0], f"the newest heading is '{headings[0]}'"


# -- README, CI and pre-commit say the same ---------------------------------------------------------------------------


def readme_command(name: str) -> str:
    found = re.search(rf"^<!-- command: {name} -->\n```bash\n(.+)\n```$", README, re.MULTILINE)
    assert found, f"README.md has no one-line bash block below <!-- command: {name} -->"
    return found[1]


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_a_readme_command_does_its_own_set_up(name):
    make, install, *_ = readme_command(name).split(" && ")
    assert make == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install ")
    extras = re.search(r"-e [\"']?\.(?:\[(.+)\])?", install)
    assert extras, f"'{install}' does not install this checkout"
    known = PROJECT["project"]["optional-dependencies"]
    assert set(filter(None, (extras[1] or "").split(","))) <= set(known)


def test_ci_runs_the_test_command_of_the_readme():
    take = re.search(r"^tests=\$\((awk .+ README\.md)\)$", CI, re.MULTILINE)
    assert take, ".ci/run no longer takes its test command from README.md"
    taken = subprocess.run(["bash", "-c", take[1]], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    assert taken == readme_command("tests")
    halves = re.findall(r'^eval "(\$\{tests.+?\})"', CI, re.MULTILINE)
    script = "tests=$1; " + "; ".join(f'echo "{half}"' for half in halves)
    typed = subprocess.run(["bash", "-c", script, "-", taken], capture_output=True, text=True, check=True).stdout.splitlines()
    assert " && ".join(typed) == taken


def test_pre_commit_runs_what_ci_runs():
    checks = re.findall(r"^check (.+)$", CI, re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == checks
    pinned = [package for hook in hooks for package in hook.get("additional_dependencies", [])]
    assert pinned
    assert all(f'"{package}"' in CI for package in pinned)


def test_links_in_the_readme_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_the_python_examples_of_the_readme_run():
    # An example that needs something that a fresh machine has not carries <!-- not run: the reason --> above it.
    blocks = re.findall(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    examples = [code for excused, code in blocks if not excused]
    assert len(examples) >= 3
    # each in a module of its own, so that it stands alone
    run_python(f"""
import sys, types
for number, code in enumerate({examples!r}):
    module = types.ModuleType(f"readme_example_{{number}}")
    sys.modules[module.__name__] = module
    exec(compile(code, f"README.md, python example {{number}}", "exec"), module.__dict__)
""")
