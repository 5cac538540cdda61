"""What a screening finds of earlier ones: their outputs, and failures of attempts that were killed."""

from __future__ import annotations

import json
import time
from unittest import mock

import pyarrow.parquet as pq
import pytest

from tests.screening.scans_written import write_folder, write_tar
from xrdfast.models import build_model
from xrdfast.prediction import SymmetryPredictor
from xrdfast.screening import pipeline
from xrdfast.screening.pipeline import Screener


@pytest.fixture(scope="module")
def predictor() -> SymmetryPredictor:
    return SymmetryPredictor(build_model("small").eval())


def test_failures_of_an_attempt_that_was_killed_are_forgotten(predictor, tmp_path, monkeypatch):
    folder, output = write_folder(tmp_path / "scans", 1), tmp_path / "out.parquet"
    late = folder / "late.xy"
    late.write_text("nothing here yet\n")
    screener = Screener(predictor)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "write_table", mock.Mock(side_effect=KeyboardInterrupt))
        screener.screen([folder], output)
    late.write_bytes((folder / "0000.xy").read_bytes())
    assert screener.screen([folder], output) == (2, 0) == screener.totals(output)
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_own_output_is_known_through_a_link(predictor, tmp_path):
    folder, link = write_folder(tmp_path / "scans", 1), tmp_path / "link"
    link.symlink_to(folder)
    screener = Screener(predictor)
    assert screener.screen([link], folder / "out.parquet") == (1, 0)
    assert screener.screen([link], folder / "out.parquet") == (0, 0)


def test_answers_of_an_earlier_run_are_no_scans(predictor, tmp_path):
    folder = write_folder(tmp_path / "scans", 1)
    (folder / "bad.xy").write_text("nothing here\n")
    assert Screener(predictor).screen([folder], folder / "a.parquet") == (1, 1)
    assert Screener(predictor, top_k=3).screen([folder], folder / "b.parquet") == (1, 1)
    (failure,) = map(json.loads, (folder / "b.errors.jsonl").read_text().splitlines())
    assert failure["scan_id"] == str(folder / "bad.xy")  # one scan: no number, as in the table


def test_a_file_that_was_mended_is_tried_again(predictor, tmp_path):
    """Once for each change, and its failure is forgotten when it is answered."""
    folder, output = write_folder(tmp_path / "scans", 1), tmp_path / "out.parquet"
    broken = [folder / "broken.xy", folder / "other.xy"]
    for path in broken:
        path.write_text("nothing here\n")
    screener = Screener(predictor)
    assert screener.screen([folder], output) == (1, 2)
    assert screener.screen([folder], output) == (0, 0)
    time.sleep(0.02)  # more than the clock of a file system
    broken[0].write_bytes((folder / "0000.xy").read_bytes())
    broken[1].write_text("nothing yet\n")
    assert screener.screen([folder], output) == (1, 1)
    assert screener.totals(output) == (2, 1)
    assert screener.screen([folder], output) == (0, 0)
    files = pq.read_table(output)["file"].to_pylist()
    assert sorted(files) == [str(folder / "0000.xy"), str(broken[0])]
    (failure,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert failure["file"] == str(broken[1])


def test_a_container_that_was_mended_is_not_read_twice(predictor, tmp_path):
    """Some of its scans were answered."""
    whole, output = write_tar(tmp_path / "some.tar", 3).read_bytes(), tmp_path / "out.parquet"
    (tmp_path / "some.tar").write_bytes(whole[: 3 * len(whole) // 5])
    screener = Screener(predictor)
    answered, failed = screener.screen([tmp_path / "some.tar"], output)
    assert answered >= 1 and failed >= 1
    time.sleep(0.02)
    (tmp_path / "some.tar").write_bytes(whole)
    assert screener.screen([tmp_path / "some.tar"], output) == (0, 0)
    assert screener.totals(output) == (answered, failed)
