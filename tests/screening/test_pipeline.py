"""The pipeline: one row a scan, whatever the engine, and nothing lost wherever a run is killed."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.screening.scans_written import TWO_THETA, counts, write_folder, write_npz, write_tar
from xrdfast.data import files
from xrdfast.data.generate import AugmentConfig
from xrdfast.data.scans import read, scan_of_points
from xrdfast.errors import InputError
from xrdfast.models import build_model
from xrdfast.posterior import Calibration
from xrdfast.prediction import SUPERCLASSES, SymmetryPredictor
from xrdfast.screening import pipeline, sources
from xrdfast.screening.manifest import Manifest
from xrdfast.screening.packed import pack
from xrdfast.screening.pipeline import Screener, rank_of_environment
from xrdfast.screening.readers import Readers
from xrdfast.screening.results import SCHEMA, write_table
from xrdfast.screening.sources import Chunk
from xrdfast.suspicion import N_OWN_FEATURES
from xrdfast.symmetry import TASKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def predictor() -> SymmetryPredictor:
    torch.manual_seed(0)
    several = (0.0,) * N_OWN_FEATURES + (0.01,) * 768
    calibration = Calibration(
        dict.fromkeys(TASKS, 1.5), dict.fromkeys(TASKS, 0.8), threshold=0.004, several_phases=several
    )
    return SymmetryPredictor(build_model("small").eval(), calibration=calibration)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_FILES", 2)
    monkeypatch.setattr(sources, "CHUNK_SCANS", 2)


def table(path: Path) -> list[dict]:
    """Rows without what time alone decides."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        assert row.pop("seconds") > 0.0
    return rows


@pytest.mark.parametrize("profile", ["sticks", "lab"])
def test_rows_are_what_predict_says(predictor, tmp_path, small_chunks, profile):
    """For models of lines, and of whole scans."""
    augment = AugmentConfig(profile=profile)
    predictor = SymmetryPredictor(predictor.model, calibration=predictor.calibration, augment=augment)
    folder = write_folder(tmp_path / "scans", 3)
    rows = list(Screener(predictor).run([folder]))
    assert [set(row) for row in rows] == [set(SCHEMA.names)] * 3
    for row in rows:
        answer = predictor.predict_file(row["file"])
        assert row["space_group"] == [c.space_group_number for c in answer.candidates]
        assert row["probability"] == pytest.approx([c.probability for c in answer.candidates], abs=1e-5)
        assert row["confidence"] == row["probability"][0]
        for level in SUPERCLASSES:
            assert row[level] == answer.superclasses[level][0][0]
            assert row[f"{level}_probability"] == pytest.approx(answer.superclasses[level][0][1], abs=1e-5)
        assert (row["kind"], row["n_points"], row["wavelength_source"]) == ("scan", 1701, "assumed")
        assert (row["two_theta_first"], row["two_theta_last"]) == (5.0, 90.0)
        assert len(row["thumbnail"]) == 200 and max(row["thumbnail"]) == 255
        assert row["out_of_distribution"] == pytest.approx(answer.out_of_distribution, abs=1e-5)
        assert 0.0 <= row["out_of_distribution"] <= 1.0 and (row["several_phases"] is None) == (
            profile == "sticks"
        )
        assert row["several_phases"] == pytest.approx(answer.several_phases, abs=1e-5)
        assert tuple(row["conformal_set"]) == answer.conformal_set != ()
    scans = [read(row["file"]) for row in rows]
    again = list(Screener(predictor).run(iter(scans)))
    assert [row["space_group"] for row in again] == [row["space_group"] for row in rows]


def test_failures_and_notes(predictor, tmp_path):
    x = np.arange(20.0, 40.0, 0.01)
    noise = np.random.default_rng(0).normal(100.0, 5.0, len(x))
    for name, y in (("flat", noise), ("one", noise + 60.0 * np.exp(-(((x - 30.0) / 0.1) ** 2)))):
        (tmp_path / f"{name}.xy").write_text("".join(f"{a:.2f} {b:.3f}\n" for a, b in zip(x, y, strict=True)))
    (tmp_path / "lines.xy").write_text("100 1\n120 2\n")
    told = []
    rows = list(Screener(predictor).run([tmp_path], told.append))
    reasons = {os.path.basename(failure.file): failure.reason for failure in told}
    assert set(reasons) == {"flat.xy", "lines.xy"} and [os.path.basename(r["file"]) for r in rows] == [
        "one.xy"
    ]
    assert "peaks" in reasons["flat.xy"] and "within 5..90 degrees" in reasons["lines.xy"]
    assert all(f"{name}: " in reason for name, reason in reasons.items())
    notes = " ".join(rows[0]["notes"])
    assert "too noisy" in notes and "range too short" in notes and "amorphous" in notes
    with pytest.warns(UserWarning, match="peaks"):
        list(Screener(predictor).run([tmp_path / "flat.xy"]))


def test_one_path_or_scan_need_no_list(predictor, tmp_path):
    """A text is a path, not a list of letters: "/" would be the whole file system."""
    path = write_folder(tmp_path / "scans", 1) / "0000.xy"
    rows = [list(Screener(predictor).run(item)) for item in (str(path), path, read(path))]
    assert all(len(one) == 1 and one[0]["space_group"] == rows[0][0]["space_group"] for one in rows)


def test_what_instruments_write_is_a_scan(predictor, tmp_path):
    """Of however few points; the rule of a thousand is for columns of text."""
    thin = slice(0, 1700, 4)
    np.savez(tmp_path / "few.npz", two_theta=TWO_THETA[thin], intensity=counts(0)[None, thin])
    np.savetxt(tmp_path / "few.xy", np.c_[TWO_THETA, counts(0)][thin], "%.3f")
    pack(tmp_path / "few.scans.safetensors", [read(tmp_path / "few.xy")])
    rows = {Path(row["file"]).suffixes[0]: row for row in Screener(predictor).run([tmp_path])}
    assert [rows[name]["kind"] for name in (".npz", ".scans", ".xy")] == ["scan", "scan", "sticks"]
    assert "read as a list of 425 lines" in rows[".xy"]["notes"]


def test_what_a_model_cannot_say_is_null(tmp_path):
    (row,) = Screener(build_model("plain_cnn").eval()).run(write_folder(tmp_path / "scans", 1))
    assert row["confidence"] is None and row["conformal_set"] is None and row["out_of_distribution"] is None


def test_resuming_adds_new_files_alone(predictor, tmp_path, small_chunks):
    folder, output = write_folder(tmp_path / "scans", 3), tmp_path / "scans" / "out.parquet"
    (folder / "bad.xy").write_text("nothing here\n")
    screener = Screener(predictor)
    assert screener.screen([folder], output) == (3, 1)
    first = table(output)
    assert screener.screen([folder], output) == (0, 0)  # output and parts are no scans
    write_folder(folder, 2, first=3)
    assert screener.screen([folder], output) == (2, 0)
    assert table(output)[:3] == first and len(table(output)) == 5
    assert screener.totals(output) == (5, 1)
    assert [p.name for p in (folder / "out.parquet.parts").iterdir() if p.name[0] != "."] == [
        "manifest.jsonl"
    ]
    (failure,) = map(json.loads, (folder / "out.errors.jsonl").read_text().splitlines())
    assert failure["file"] == str(folder / "bad.xy") and "must" in failure["reason"]
    with pytest.raises(InputError, match="another"):
        Screener(predictor, top_k=3).screen([folder], output)
    other = tmp_path / "other.parquet"
    other.write_bytes(b"")
    with pytest.raises(InputError, match="another"):
        screener.screen([folder], other)


def test_a_run_goes_on_from_another_folder(predictor, tmp_path, small_chunks, monkeypatch):
    """Whose paths were relative, one chunk of which was not answered."""
    write_folder(tmp_path / "scans", 3)
    (tmp_path / "other").mkdir()
    screener, output = Screener(predictor), tmp_path / "out.parquet"
    monkeypatch.chdir(tmp_path)
    assert screener.screen(["scans/*.xy"], "out.parquet", rank=0, n_ranks=2) == (2, 0)
    monkeypatch.chdir(tmp_path / "other")
    assert screener.screen([tmp_path / "scans"], output) == (1, 0)
    assert [row["file"] for row in table(output)] == [f"{tmp_path}/scans/{i:04d}.xy" for i in range(3)]


def test_a_full_disk_loses_nothing(predictor, tmp_path, small_chunks, monkeypatch):
    folder, output = write_folder(tmp_path / "scans", 6), tmp_path / "out.parquet"
    (folder / "0003.xy").write_text("nothing here\n")
    screener, replace = Screener(predictor), os.replace
    for fails_at in range(6):
        calls = 0

        def full(source, target, fails_at=fails_at):
            nonlocal calls
            calls += 1
            if calls > fails_at % 2:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(InputError, match="No space left"):
            screener.screen([folder], output)
        assert not output.exists()
    monkeypatch.undo()
    screener.screen([folder], output)
    assert sorted(os.path.basename(row["file"]) for row in table(output)) == [
        f"{i:04d}.xy" for i in (0, 1, 2, 4, 5)
    ]
    assert screener.totals(output) == (5, 1)


KILLED = """
import sys
import torch
from xrdfast.models import build_model
from xrdfast.screening import pipeline, sources
from xrdfast.screening.pipeline import Screener

torch.manual_seed(0)
torch.set_num_threads(1)
sources.CHUNK_FILES = 2
screener = Screener(build_model("plain_cnn").eval())
print("ready", flush=True)
sys.stdin.readline()
print(screener.screen([sys.argv[1]], sys.argv[2], progress=lambda *_: print("part", flush=True)), flush=True)
"""


def test_killed_at_random_it_goes_on(tmp_path):
    """Killed after a random number of parts and a random moment more, until it gets through."""
    folder, output = write_folder(tmp_path / "scans", 12), tmp_path / "out.parquet"
    (folder / "0005.xy").write_text("nothing here\n")
    rng, kills = random.Random(0), 0
    for attempt in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        with process:
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("\n")
            process.stdin.flush()
            if attempt < 4:
                for _ in range(rng.randrange(3)):
                    process.stdout.readline()
                time.sleep(rng.uniform(0.0, 0.05))
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
            process.stdout.read()
        assert process.returncode == 0
        break
    assert kills == 4
    assert sorted(os.path.basename(row["file"]) for row in table(output)) == [
        f"{i:04d}.xy" for i in range(12) if i != 5
    ]
    assert len((tmp_path / "out.errors.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("moment", ["replace", "write", "unlink"])
def test_stopped_at_every_step_it_goes_on(predictor, tmp_path, small_chunks, monkeypatch, moment):
    """Every rename, write of the manifest and removal in turn is where a run ends for good."""

    class Ended(BaseException):
        pass

    folder, output = write_folder(tmp_path / "scans", 5), tmp_path / "out.parquet"
    (folder / "0002.xy").write_text("nothing here\n")
    screener = Screener(predictor)
    owner, name = {"replace": (os, "replace"), "write": (os, "fsync"), "unlink": (Path, "unlink")}[moment]
    whole = getattr(owner, name)
    for ends_at in range(40):
        calls = 0

        def ending(*arguments, ends_at=ends_at, **options):
            nonlocal calls
            calls += 1
            if calls > max(1, ends_at // 4):
                raise Ended
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, ending)
        try:
            screener.screen([folder], output)
            break
        except Ended:
            continue
        finally:
            monkeypatch.setattr(owner, name, whole)
    else:
        screener.screen([folder], output)
    assert sorted(os.path.basename(row["file"]) for row in table(output)) == [
        f"{i:04d}.xy" for i in (0, 1, 3, 4)
    ]
    assert screener.totals(output) == (4, 1)


def test_reader_processes_give_the_same(predictor, tmp_path, small_chunks):
    folder = write_folder(tmp_path / "scans", 5)
    paths = [folder, write_tar(tmp_path / "some.tar", 3), write_npz(tmp_path / "some.npz", 3)]
    for n_readers in (0, 2):
        done = Screener(predictor, n_readers=n_readers).screen(paths, tmp_path / f"{n_readers}.parquet")
        assert done == (11, 0)
    assert table(tmp_path / "0.parquet") == table(tmp_path / "2.parquet")


def test_a_reader_that_dies_takes_nothing_with_it(tmp_path):
    """Chunks that were with it are read again, apart from those that new readers have by then."""
    paths = sorted(map(str, write_folder(tmp_path / "scans", 8).iterdir()))
    with Readers(2, None, False) as readers:

        def chunks():
            for number, path in enumerate(paths):
                if number == 3:
                    for process in readers._pool._processes.values():
                        process.kill()
                yield number, Chunk("files", (path,))

        pools = []
        for number, _, (scan,) in readers.read(chunks()):
            assert scan.file == paths[number] and scan.n_points == 1701
            pools.append(readers._pool)
    assert len(pools) == 8 and pools[0] is None and len(set(pools[1:])) == 1


class _Deadly(str):
    """Ends the process that unpickles it, as a crash in native code would."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_a_file_that_ends_its_reader_is_one_failure(tmp_path):
    first, *paths = sorted(map(str, write_folder(tmp_path / "scans", 4).iterdir()))
    chunks = [Chunk("files", (first, _Deadly("bad.xy"))), *(Chunk("files", (path,)) for path in paths)]
    with Readers(2, None, False) as readers:
        found = [scan for *_, scans in readers.read(enumerate(chunks)) for scan in scans]
    assert [scan.file for scan in found] == [first, "bad.xy", *paths]
    assert "must survive the file" in found[1].reason


def test_readers_need_no_torch(tmp_path):
    """Nor pandas: what each reader process would have to load before it reads."""
    path = write_folder(tmp_path / "scans", 1) / "0000.xy"
    program = (
        "import sys; from xrdfast.screening import readers; "
        "from xrdfast.screening.sources import Chunk; "
        f"(scan,) = readers.prepare_chunk(Chunk('files', ({str(path)!r},)), None, True); "
        "print(scan.n_points, {'torch', 'pandas', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1701", "set()"], done.stderr


def test_threads_keep_the_order_and_hold_back():
    """Results come in order, a few items ahead of who takes them; torch's own threads are as before."""
    before, taken = torch.get_num_threads(), 0

    def items():
        nonlocal taken
        for i in range(100):
            taken += 1
            yield i

    def work(i: int) -> tuple[int, int]:
        time.sleep(0.001 * (i % 3))
        return i, torch.get_num_threads()

    with pipeline._Threads(3, torch.device("cpu")) as threads:
        for i, found in enumerate(threads.each(work, items())):
            assert found == (i, 1) and taken <= i + 1 + 4
    assert taken == 100 and torch.get_num_threads() == before


def test_an_error_of_a_thread_is_the_callers():
    """And nothing that waits is begun any more."""
    begun = []

    def work(item: int) -> float:
        begun.append(item)
        return 1 / (1 - item)

    with pytest.raises(ZeroDivisionError), pipeline._Threads(1, torch.device("cpu")) as threads:
        list(threads.each(work, range(100)))
    assert begun[:2] == [0, 1] and len(begun) <= 4


def test_a_chunk_is_answered_in_pieces(predictor, tmp_path, monkeypatch):
    """Larger than a batch, read by whoever answers or not; a packed file that is cut is one failure a chunk."""
    monkeypatch.setattr(sources, "CHUNK_SCANS", 5)
    folder, packed = write_folder(tmp_path / "scans", 7), tmp_path / "all.scans.safetensors"
    pack(packed, (read(path) for path in sorted(folder.iterdir())))
    whole = Screener(predictor)
    for n_readers in (0, 1):
        done: list[int] = []
        pieces = Screener(predictor, batch_size=2, n_readers=n_readers)
        output = tmp_path / f"{n_readers}.parquet"
        told = pieces.screen([packed, folder], output, progress=lambda now, *_, done=done: done.append(now))
        assert told == (14, 0)
        assert done == [5, 7, 14]
        names = pq.read_table(output, columns=["scan_id"])["scan_id"].to_pylist()
        assert names == [row["scan_id"] for row in whole.run([packed, folder])]
    chunk = Chunk("packed", (str(tmp_path / "gone.scans.safetensors"),), 0, 5, 5)
    manifest = Manifest(tmp_path / "gone.parquet", whole.digest())
    with open(manifest.parts / "manifest.jsonl", "a") as file:
        file.write(json.dumps(chunk.to_dict()) + "\n")
    assert pieces.screen([], tmp_path / "gone.parquet") == (0, 1)  # found, and away before it was read


def test_a_process_answers_its_share_of_what_another_noted(predictor, tmp_path, small_chunks, monkeypatch):
    """Another process is quicker between this one's look at the manifest and its own notes."""
    extend = Manifest.extend

    def late(self: Manifest, files):
        files = list(files)
        list(extend(self, files))
        yield from extend(self, files)

    monkeypatch.setattr(Manifest, "extend", late)
    folder, output = write_folder(tmp_path / "scans", 8), tmp_path / "out.parquet"
    assert Screener(predictor).screen([folder], output, rank=1, n_ranks=2) == (4, 0)
    assert not output.exists()
    assert Screener(predictor).screen([folder], output, rank=0, n_ranks=2) == (4, 0)
    assert len(pq.read_table(output)) == 8


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answers(gpu, predictor, tmp_path):
    folder = write_folder(tmp_path / "scans", 7)
    model = copy.deepcopy(predictor.model).cuda()
    there = Screener(SymmetryPredictor(model, calibration=predictor.calibration))
    here = Screener(predictor)
    assert (here.batch_size, there.batch_size) == (32, 512)
    for ours, theirs in zip(here.run([folder]), there.run([folder]), strict=True):
        assert ours["scan_id"] == theirs["scan_id"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


def test_parts_are_what_pyarrow_makes(predictor, tmp_path):
    rows = list(Screener(predictor).run([write_folder(tmp_path / "scans", 3)]))
    rows[1] |= {"member": "Ä\u4e2d", "notes": ["", "a\nb", "ö"], "conformal_set": [], "confidence": None}
    rows[2] = dict.fromkeys(rows[2])
    for n in (0, 1, 3):
        write_table(tmp_path / "part.parquet", rows[:n])
        pq.read_table(tmp_path / "part.parquet").validate(full=True)
        assert pq.read_table(tmp_path / "part.parquet") == pa.Table.from_pylist(rows[:n], schema=SCHEMA)


def test_ranks_share_the_work(predictor, tmp_path, small_chunks, monkeypatch):
    folder = write_folder(tmp_path / "scans", 7)
    screener = Screener(predictor)
    screener.screen([folder], tmp_path / "one.parquet")
    shared = tmp_path / "shared.parquet"
    done = []
    for rank in range(3):
        assert not shared.exists()
        done.append(screener.screen([folder], shared, rank=rank, n_ranks=3)[0])
    assert sum(done) == 7 and all(done)
    assert table(shared) == table(tmp_path / "one.parquet")
    for variables, expected in (
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
    ):
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert rank_of_environment() == expected
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK"):
        rank_of_environment()


def test_watching_a_folder(predictor, tmp_path):
    folder, output = write_folder(tmp_path / "scans", 1), tmp_path / "out.parquet"
    looks = 0

    def watch() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            assert len(table(output)) == 1  # seen twice without a change
            write_folder(folder, 1, first=1)
        return looks < 4

    assert Screener(predictor).screen([folder], output, watch=watch) == (2, 0)
    assert len(table(output)) == 2


def test_watching_joins_what_is_worth_it(predictor, tmp_path, monkeypatch):
    """And all of it at the end; ended for good in between, a run goes on without loss."""

    class Ended(BaseException):
        pass

    folder, output = write_folder(tmp_path / "scans", 20), tmp_path / "out.parquet"
    screener, lengths = Screener(predictor), []

    def look() -> bool:
        lengths.append(len(table(output)) if output.exists() else 0)
        if len(lengths) == 2 and not (folder / "0020.xy").exists():
            write_folder(folder, 1, first=20)
        if len(lengths) == 4:
            raise Ended
        return True

    with pytest.raises(Ended):
        screener.screen([folder], output, watch=look)
    assert lengths == [0, 20, 20, 20] and screener.totals(output) is None
    for first, expected in ((21, [20, 22]), (22, [22, 22])):  # the second look finds the file settled
        write_folder(folder, 1, first=first)
        lengths.clear()
        assert screener.screen([folder], output, watch=lambda: look() and len(lengths) < 2) == (1, 0)
        assert lengths == expected
    assert screener.totals(output) == (23, 0)
    assert sorted(os.path.basename(row["file"]) for row in table(output)) == [
        f"{i:04d}.xy" for i in range(23)
    ]


def test_watching_ends_with_a_signal():
    from xrdfast.screening.watching import Watch

    before = signal.getsignal(signal.SIGTERM)
    with Watch(60.0) as watch:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert not watch()
        assert signal.getsignal(signal.SIGTERM) == before
    with Watch(0.0) as watch:
        assert watch()


def test_a_script_without_a_guard_can_screen(tmp_path):
    """Readers are new processes; they must not run the script that started them again."""
    write_folder(tmp_path / "scans", 3)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, xrdfast\nprint('once')\n"
        "for row in xrdfast.Screener(n_readers=1).run([sys.argv[1]]):\n    print(row['scan_id'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "scans")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.stdout.split().count("once") == 1
    assert len(done.stdout.splitlines()) == 1 + 3


MEASURED = """
import resource
import sys
import time
from pathlib import Path
import torch
from xrdfast.data.generate import AugmentConfig
from xrdfast.models import build_model
from xrdfast.prediction import SymmetryPredictor
from xrdfast.screening.pipeline import Screener

if __name__ == "__main__":
    predictor = SymmetryPredictor(build_model("small").eval(), augment=AugmentConfig(profile="lab"))
    start = time.process_time()
    done = Screener(predictor).screen([sys.argv[1]], sys.argv[2])  # packed scans need no readers
    print(done[0], time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_and_time_of_a_scan_are_flat(tmp_path):
    """100,000 scans take at most 1.5 GB, and per scan the processor time that 1,000 take."""
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    packed = tmp_path / "many.scans.safetensors"
    two_theta = 5.0 + 0.05 * np.arange(1701)
    scans = [
        scan_of_points(two_theta, read(path).intensity, path=str(path))
        for path in sorted(write_folder(tmp_path / "scans", 20).iterdir())
    ]
    seconds, memory = {}, {}
    for n in (1000, 10_000, 100_000):
        pack(packed, (scans[i % len(scans)] for i in range(n)))
        done = subprocess.run(
            [sys.executable, str(script), str(packed), str(tmp_path / f"{n}.parquet")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        answered, used, peak = map(float, done.stdout.split())
        assert answered == n
        seconds[n], memory[n] = used / n, peak * 1024
    print(seconds, memory)
    assert memory[100_000] < 1.5e9 and memory[100_000] < 1.25 * memory[10_000]
    assert seconds[100_000] < 1.4 * seconds[10_000] and seconds[10_000] < 1.4 * seconds[1000]


def test_refusals(predictor):
    for wrong in ({"top_k": 0}, {"batch_size": 0}, {"n_readers": -1}):
        with pytest.raises(ValueError, match="Screener"):
            Screener(predictor, **wrong)
    assert list(Screener(predictor).run([])) == []
