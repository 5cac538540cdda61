"""Screening on a real local Ray cluster of two workers gives what one process gives."""

from __future__ import annotations

import gc
import warnings

import pyarrow.parquet as pq
import pytest
import torch

from tests.screening.scans_written import write_folder, write_npz
from xrdfast.models import build_model
from xrdfast.screening import sources
from xrdfast.screening.pipeline import Screener

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)  # two readers and the model
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        gc.collect()  # Ray's processes, still open: here, not in a test to come


@pytest.mark.filterwarnings("ignore")  # Ray's own: sockets and processes that it closes later
def test_ray_gives_the_same(tmp_path, monkeypatch, cluster):
    from xrdfast.screening.ray_engine import screen_with_ray

    monkeypatch.setattr(sources, "CHUNK_FILES", 2)
    paths = [write_folder(tmp_path / "scans", 4), write_npz(tmp_path / "some.npz", 3)]
    (tmp_path / "scans" / "bad.xy").write_text("nothing here\n")
    torch.manual_seed(0)
    screener = Screener(build_model("plain_cnn").eval())
    assert screener.screen(paths, tmp_path / "one.parquet") == (7, 1)
    assert screen_with_ray(screener, paths, tmp_path / "ray.parquet") == (7, 1)
    assert screen_with_ray(screener, paths, tmp_path / "ray.parquet") == (0, 0)
    one, other = (pq.read_table(tmp_path / f"{name}.parquet").drop(["seconds"]) for name in ("one", "ray"))
    assert one.to_pylist() == other.to_pylist()
    assert (tmp_path / "one.errors.jsonl").read_text() == (tmp_path / "ray.errors.jsonl").read_text()
