"""The compiled Mojo kernels: built once for a revision of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from step3p5 import kernel_package
from step3p5.kernel_package import CACHE_VARIABLE, compiled_package, package_name


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "__init__.mojo").write_text("comptime ANSWER = 42\n")
    return folder


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packages that were built, by a builder that takes no time."""
    built: list[Path] = []

    def build(folder: Path, package: Path) -> None:
        built.append(package)
        package.touch()

    monkeypatch.setattr(kernel_package, "build", build)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return built


def test_sources_are_built_once(sources: Path, builds: list[Path]) -> None:
    assert compiled_package(sources) == compiled_package(sources)
    assert len(builds) == 1


def test_changed_sources_are_built_anew(sources: Path, builds: list[Path]) -> None:
    first = compiled_package(sources)
    (sources / "__init__.mojo").write_text("comptime ANSWER = 43\n")
    assert compiled_package(sources) != first
    assert len(builds) == 2


def test_a_package_beside_artifacts_is_taken(sources: Path, builds: list[Path], tmp_path: Path) -> None:
    carried = tmp_path / package_name(sources)
    carried.touch()
    assert compiled_package(sources, tmp_path) == carried
    assert builds == []


def test_where_the_cache_cannot_be_written_the_package_is_built_elsewhere(
    sources: Path, builds: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    package = compiled_package(sources)
    assert package.is_file()
    assert str(tmp_path / "cache") in caplog.text


def test_mojo_compiles_the_sources_under_the_package_s_name(sources: Path, tmp_path: Path) -> None:
    package = tmp_path / package_name(sources)
    kernel_package.build(sources, package)
    assert package.stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".building")] == []
