"""Tasks that installed libraries bring (F067): the example library, installed as a user would, and libraries with faults."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastq
from tests.conftest import eventually

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "examples" / "library"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example library installed into it, by pip and without a network."""
    folder = tmp_path_factory.mktemp("library")
    source = shutil.copytree(LIBRARY, folder / "source")  # a build leaves traces in its source
    command = [
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        folder / "site",
        source,
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def environ(url: str, *paths: Path) -> dict[str, str]:
    """A worker's environment: these folders hold what is installed beside fastq."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    return {**os.environ, "PYTHONPATH": path, "FASTQ_REDIS_URL": url, "FASTQ_METRICS_PORT": "0"}


@contextlib.contextmanager
def worker(url: str, *paths: Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`fastq worker` without an application."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastq", "worker"],
        env=environ(url, *paths),
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def announce(folder: Path, entry: str) -> Path:
    """A folder like site-packages in which a distribution announces `entry`."""
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fastq.tasks]\n{entry}\n")
    return folder


def result(app: fastq.FastQ, job: fastq.JobHandle[object]) -> object:
    """What the job returned, once it has."""
    status = eventually(lambda: (found := job.status_sync()) is not None and found.state.final and found, 30)
    assert status.state == "success", status
    return status.result


def test_a_worker_without_an_application_runs_the_tasks_of_installed_libraries(site, redis_url, tmp_path):
    app = fastq.FastQ(redis_url)  # a producer that does not know the library: by name
    text = tmp_path / "text"
    text.write_bytes(b"abc")
    with worker(redis_url, site, cwd=tmp_path) as process:
        assert result(app, app.enqueue_sync("checksums.crc32", "abc")) == zlib.crc32(b"abc")
        assert result(app, app.enqueue_sync("checksums.sha256", path=str(text))) == hashlib.sha256(b"abc").hexdigest()
        process.terminate()
        assert process.wait(20) == 0
    app.close()


def test_a_producer_takes_the_tasks_of_a_library_in_and_gets_its_calls_checked(site, redis_url, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    app = fastq.FastQ(redis_url)
    assert "checksums" in app.load_entry_points()
    assert app.load_entry_points(), "twice is once"
    from checksums.tasks import sha256  # type: ignore[import-not-found]

    assert sha256.enqueue_sync("some/path").status_sync().state == "pending"
    with pytest.raises(fastq.InvalidArguments, match="sha256"):
        app.enqueue_sync("checksums.sha256", pfad="x")
    app.close()


def test_without_an_application_and_without_a_library_a_worker_says_so(redis_url, tmp_path):
    with worker(redis_url, cwd=tmp_path) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "no installed package announces tasks" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    ("entry", "reason"),
    [("faulty = json:loads", "'faulty' (json:loads)"), ("faulty = no.such.module:tasks", "No module named 'no'")],
)
def test_a_library_with_a_fault_ends_the_worker_with_a_reason(redis_url, tmp_path, entry, reason):
    with worker(redis_url, announce(tmp_path / "site", entry), cwd=tmp_path) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert reason in said
    assert "Traceback" not in said
    assert str(ROOT / "fastq") not in said, "no frames of ours"
