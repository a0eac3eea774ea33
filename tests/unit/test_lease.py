"""One driver a run: who is refused, who takes over, who notices."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.lease import DEAD_SECONDS, Holder, leased, living_holder, require_free
from batchcls.storage import Storage
from tests.conftest import REPOSITORY

STORAGE = Storage()


def put(folder: Path, number: int, holder: Holder) -> None:
    (folder / "lease").mkdir(exist_ok=True)
    (folder / "lease" / f"{number:06d}.json").write_text(json.dumps(asdict(holder)))


def test_a_second_job_is_refused_while_the_first_holds_the_run(tmp_path: Path):
    with leased(str(tmp_path), STORAGE):
        with pytest.raises(InputError, match="works on this run"), leased(str(tmp_path), STORAGE):
            pass
        with pytest.raises(InputError, match="works on this run"):
            require_free(str(tmp_path), STORAGE)
    require_free(str(tmp_path), STORAGE)
    with leased(str(tmp_path), STORAGE):
        assert living_holder(str(tmp_path), STORAGE) is not None


def test_a_killed_process_is_taken_over_from_at_once(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from batchcls.runs.lease import leased\n"
        "from batchcls.storage import Storage\n"
        f"with leased({str(tmp_path)!r}, Storage()):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid}"):
        require_free(str(tmp_path), STORAGE)
    holder.kill()
    holder.communicate()
    with leased(str(tmp_path), STORAGE) as lease:
        lease.confirm()
    assert len(list((tmp_path / "lease").iterdir())) == 2


def test_a_process_number_given_to_another_process_is_no_life(tmp_path: Path):
    here = Holder.here()
    put(tmp_path, 1, replace(here, process_start=1))
    require_free(str(tmp_path), STORAGE)
    put(tmp_path, 2, here)
    with pytest.raises(InputError):
        require_free(str(tmp_path), STORAGE)


def test_a_job_of_another_host_lives_as_long_as_it_beats(tmp_path: Path):
    other = replace(Holder.here(), place="elsewhere", host="elsewhere")
    put(tmp_path, 1, other)
    with pytest.raises(InputError, match="on elsewhere"):
        require_free(str(tmp_path), STORAGE)
    put(tmp_path, 1, replace(other, beat=time.time() - DEAD_SECONDS - 1))
    with leased(str(tmp_path), STORAGE):
        pass
    put(tmp_path, 3, replace(other, released=True))
    require_free(str(tmp_path), STORAGE)


def test_a_driver_that_was_taken_over_from_notices_and_leaves_the_new_lease_alone(tmp_path: Path):
    with leased(str(tmp_path), STORAGE) as lease:
        put(tmp_path, 2, replace(Holder.here(), owner="other"))
        lease.check()  # asks nobody
        with pytest.raises(LeaseLostError, match="has taken"):
            lease.confirm()
        with pytest.raises(LeaseLostError):
            lease.check()
    assert json.loads((tmp_path / "lease" / "000002.json").read_text())["released"] is False
