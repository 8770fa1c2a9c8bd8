"""The four plainly named packages are ours, or nothing runs. Real installs, real interpreters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guard.ownership import PACKAGES, check_ownership

ROOT = Path(__file__).resolve().parents[2]


def ask(*path: Path) -> subprocess.CompletedProcess[str]:
    """Run the check in a fresh interpreter that searches `path` first."""
    code = "from guard.ownership import check_ownership; print(check_ownership())"
    return run(code, *path)


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=60,
    )


def package(folder: Path, name: str, text: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed trimtab's wheel."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "-q", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(ROOT)], check=True)
    return target


def test_one_checkout_passes_and_names_its_folder() -> None:
    assert check_ownership() == ROOT


def test_an_installed_wheel_passes_and_names_its_folder(installed: Path) -> None:
    done = ask(installed)
    assert (done.returncode, done.stdout.strip()) == (0, str(installed.resolve())), done.stderr


def test_it_needs_neither_torch_nor_any_other_library() -> None:
    code = (
        "import sys; from guard.ownership import check_ownership; check_ownership();"
        "print([n for n in ('torch', 'pydantic', 'rich', 'typer', 'yaml') if n in sys.modules])"
    )
    assert run(code, ROOT).stdout.strip() == "[]"


def test_it_takes_less_than_twenty_milliseconds() -> None:
    code = (
        "import time; from guard.ownership import check_ownership; t = time.process_time();"
        "check_ownership(); print(time.process_time() - t)"
    )
    assert min(float(run(code, ROOT).stdout) for _ in range(3)) < 0.02


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "guard"])
def test_a_package_of_the_same_name_earlier_on_the_path_is_named(tmp_path: Path, name: str) -> None:
    package(tmp_path, name)
    done = ask(tmp_path, ROOT)
    assert done.returncode == 1
    assert f"package `{name}` comes from {tmp_path / name}, expected {ROOT / name}" in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_a_single_module_of_the_same_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text("")
    assert f"comes from {tmp_path / 'serve.py'}" in ask(tmp_path, ROOT).stderr


def test_the_distribution_that_brought_the_other_package_is_to_be_uninstalled(
    tmp_path: Path,
) -> None:
    package(tmp_path, "serve")
    info = tmp_path / "serving_toolkit-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: serving-toolkit\nVersion: 1.0\n")
    (info / "RECORD").write_text("serve/__init__.py,,\n")
    assert "pip uninstall serving-toolkit" in ask(tmp_path, ROOT).stderr


def test_a_missing_package_is_named(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    shutil.rmtree(site / "cli")
    done = ask(site)
    # Where trimtab is also installed as a checkout, Python finds that one's package instead.
    assert "package `cli` is missing" in done.stderr or "package `cli` comes from" in done.stderr


def test_a_package_written_over_by_another_distribution_is_found(
    installed: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "serve" / "__init__.py").write_text("# somebody else's\n")
    done = ask(site)
    assert done.returncode == 1
    assert f"{site / 'serve' / '__init__.py'} is not the file that trimtab installed" in done.stderr
    assert "pip install --force-reinstall --no-deps trimtab" in done.stderr


def test_a_package_that_lost_its_init_file_is_found(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "serve" / "__init__.py").unlink()
    assert "package `serve` comes from" in ask(site).stderr


def test_the_command_says_so_when_another_guard_hides_ours(tmp_path: Path) -> None:
    package(tmp_path, "guard")
    code = "import sys; from cli.main import main; sys.exit(main(['--version']))"
    done = run(code, tmp_path, ROOT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"comes from {tmp_path / 'guard' / '__init__.py'}" in done.stderr
    assert "clean virtual environment" in done.stderr
