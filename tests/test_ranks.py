"""Several ranks, as torchrun starts them: the same results for any number, also after faults."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import REPOSITORY, TINY, assert_equal, checkpoint_contents, read_scores, write_pairs

from common.workers import THREAD_VARIABLES

SETTINGS = [*TINY, "train.folds=5", "train.images_per_epoch=20", "model.dropout=0.3", "optim.patience=0", "name=many"]
TRAIN = ("train.py", "--config", "many.yaml", *SETTINGS)
ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")


def start_rank(rank, count, *words, cwd, port, fault="none", in_rank=0, prefix=(), address="127.0.0.1", **environment):
    """Start a process as torchrun does, without the seconds in which torchrun itself starts."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
             "MASTER_ADDR": address, "MASTER_PORT": port, "PYTHONPATH": REPOSITORY} | ONE_THREAD | environment
    command = [*prefix, sys.executable, REPOSITORY / "tests/rank_with_fault.py", fault, in_rank, *words]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=os.environ | {k: str(v) for k, v in names.items()},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(count, *words, cwd, **options):
    """Run ranks of a script and return their exit codes and all that they wrote."""
    port = free_port()
    processes = [start_rank(rank, count, *words, cwd=cwd, port=port, **options) for rank in range(count)]
    outputs = [process.communicate() for process in processes]
    return [process.returncode for process in processes], "".join(out + err for out, err in outputs)


def torchrun(count, *words, cwd, fault="none", in_rank=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
               REPOSITORY / "tests/rank_with_fault.py", fault, in_rank, *words]
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | ONE_THREAD)


@pytest.fixture(autouse=True)
def one_thread():
    """Another number of threads rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(built_once, here, tmp_path):
    """Tiles, and the run of one process in expected/."""
    def fill(folder):
        write_pairs(folder / "tiles", 30, slides=10)
        (folder / "many.yaml").write_text("data: {root: tiles}\n")
        for name in ("data_filter.py", "train.py"):
            out = here(name, "--config", "many.yaml", *SETTINGS, cwd=folder)
            assert out.returncode == 0, out.stderr
        (folder / "runs/many").rename(folder / "expected")
    shutil.copytree(built_once("ranks", fill), tmp_path, dirs_exist_ok=True)
    return tmp_path


def assert_as_by_one(place):
    for name in ("last", "best"):
        assert_equal(checkpoint_contents(place / "expected", name), checkpoint_contents(place / "runs/many", name))
    without_times = [[line.rsplit(",", 3)[0] for line in (folder / "metrics.csv").read_text().splitlines()]
                     for folder in (place / "expected", place / "runs/many")]
    assert without_times[0] == without_times[1]
    assert not [*place.glob("runs/many/**/*.tmp")]


def test_any_number_of_ranks_gives_the_same_run_also_if_it_goes_on_with_another_number(place):
    codes, output = run_ranks(2, *TRAIN, "train.epochs=1", cwd=place)
    assert codes == [0, 0], output
    assert "5 folds on 2 ranks: rank 0: 1, 3, 5; rank 1: 2, 4" in output and output.count("epoch 1/1") == 1
    codes, output = run_ranks(3, *TRAIN, "--resume", "auto", cwd=place)
    assert codes == [0, 0, 0] and "epoch 1/" not in output, output
    assert_as_by_one(place)
    starts = json.loads((place / "runs/many/environment.json").read_text())
    assert [start["ranks"] for start in starts] == [2, 3]
    survivors = {row["survivor"] for row in checkpoint_contents(place / "expected")["history"]}
    assert survivors & {1, 2, 4}, "also folds of other ranks than the first"


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 6])
def test_as_many_ranks_as_folds_and_more(place, count):
    codes, output = run_ranks(count, *TRAIN, cwd=place)
    assert not any(codes), output
    assert ("gives work to 5 of 6 ranks; start torchrun with fewer" in output) == (count == 6)
    assert_as_by_one(place)


def test_ranks_share_out_the_tiles_of_an_evaluation(place, here):
    shutil.copytree(place / "expected", place / "runs/many")
    words = ("evaluate.py", "runs/many", "--split", "all")
    alone = here(*words, "--out", "alone", cwd=place)
    codes, output = run_ranks(2, *words, "--out", "shared", cwd=place)
    assert codes == [0, 0] and alone.returncode == 0, output
    assert read_scores(place / "alone") == read_scores(place / "shared")
    names = sorted(path.relative_to(place / "alone") for path in (place / "alone").rglob("*") if path.is_file())
    assert len([name for name in names if name.parts[0] == "predictions"]) == 30
    for name in names:
        assert (place / "alone" / name).read_bytes() == (place / "shared" / name).read_bytes(), name
    assert output.count("wrote shared") == 1


@pytest.mark.slow
def test_ranks_share_out_images_without_masks(place, here):
    shutil.copytree(place / "expected", place / "runs/many")
    for path in sorted((place / "tiles/frames").iterdir())[:5]:
        shutil.copy(path, place)
    words = ("evaluate.py", "runs/many", "--images", ".")
    assert here(*words, "--out", "alone", cwd=place).returncode == 0
    codes, output = run_ranks(2, *words, "--out", "shared", cwd=place)
    assert codes == [0, 0], output
    names = sorted(path.relative_to(place / "alone") for path in (place / "alone").rglob("*") if path.is_file())
    assert len(names) == 5 + 5 + 3
    for name in names:
        assert (place / "alone" / name).read_bytes() == (place / "shared" / name).read_bytes(), name


@pytest.mark.parametrize("fault", ["killed", pytest.param("killed in the exchange", marks=pytest.mark.slow),
                                   pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_job_and_another_number_of_ranks_goes_on(place, here, fault):
    out = torchrun(2, *TRAIN, cwd=place, fault=fault, in_rank=1)
    assert out.returncode == 1 and "epoch 1/3" in out.stdout and "epoch 2/3" not in out.stdout
    where = "" if "exchange" in fault else " in fold 2 of epoch 2"
    said = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: rank 1 on {socket.gethostname()}{where} was killed"), said
    assert "torchrun ... train.py --resume runs/many" in said[0]
    out = here("train.py", "--resume", "runs/many", cwd=place)
    assert out.returncode == 0, out.stderr
    assert_as_by_one(place)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "in_rank", "words"), [
    ("hangs", 1, "error: rank 1 on HOST in fold 2 of epoch 2 hangs: no batch for "),
    ("no memory", 1, "error: rank 1: rank 1 in fold 2 of epoch 2: the memory is too small"),
    ("killed while it writes", 0, "error: rank 1: rank 0 on HOST was killed")])
def test_other_faults_end_the_job_too(place, fault, in_rank, words):
    out = torchrun(3, *TRAIN, cwd=place, fault=fault, in_rank=in_rank)
    said = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
    assert out.returncode == 1 and len(said) == 1 and said[0].startswith(words.replace("HOST", socket.gethostname()))
    codes, output = run_ranks(2, *TRAIN, "--resume", "auto", cwd=place)
    assert codes == [0, 0], output
    assert_as_by_one(place)


def test_ranks_with_other_settings_are_refused(place):
    port = free_port()
    processes = [start_rank(rank, 2, *TRAIN, f"optim.lr=0.00{rank + 1}", cwd=place, port=port) for rank in range(2)]
    errors = [process.communicate()[1] for process in processes]
    host = socket.gethostname()
    assert [process.returncode for process in processes] == [2, 2]
    assert (f"error: rank 1 on {host} has another setting optim.lr than rank 0 on {host}: 0.002, not 0.001"
            in errors[0]) and "error: " not in errors[1]
    assert not (place / "runs/many").exists()


@pytest.mark.slow
def test_machines_may_have_the_tiles_in_other_places(place):
    other = place / "other machine"
    shutil.copytree(place / "tiles", other / "elsewhere")
    shutil.copy(place / "many.yaml", other)
    for more in (("train.epochs=1",), ("--resume", "auto")):
        port = free_port()
        processes = [start_rank(rank, 2, *TRAIN, f"data.root={root}", *more, cwd=folder, port=port)
                     for rank, (root, folder) in enumerate([("tiles", place), ("elsewhere", other)])]
        outputs = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert_as_by_one(place)
    assert not (other / "runs").exists()


def test_one_rank_says_what_is_wrong_for_all(place):
    codes, output = run_ranks(2, *TRAIN, "data.root=nowhere", cwd=place)
    assert codes == [2, 2] and output.count("error: ") == 1 and "nowhere" in output


@pytest.mark.slow
def test_torchrun_begins_or_goes_on_after_a_rank_has_died(place):
    """--max-restarts starts all ranks again, with the same command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", REPOSITORY / "tests/rank_with_fault.py", "killed once", "1", *TRAIN,
               "--resume", "auto"]
    out = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | ONE_THREAD)
    assert out.returncode == 0 and out.stdout.count("epoch 1/3") == 1 and "epoch 3/3" in out.stdout, out.stderr
    assert_as_by_one(place)


IP = shutil.which("ip")


@pytest.fixture
def two_machines():
    """Two network namespaces that a cable joins, as if they were two machines."""
    if not IP or subprocess.run([IP, "netns", "add", "crc-a"], capture_output=True).returncode:
        pytest.skip("no network namespaces here: needs iproute2 and root")
    calls = ["netns add crc-b", "link add crc-va type veth peer name crc-vb", "link set crc-va netns crc-a",
             "link set crc-vb netns crc-b", "-n crc-a addr add 10.77.0.1/24 dev crc-va",
             "-n crc-b addr add 10.77.0.2/24 dev crc-vb", "-n crc-a link set crc-va up", "-n crc-b link set crc-vb up",
             "-n crc-a link set lo up", "-n crc-b link set lo up"]
    try:
        for call in calls:
            done = subprocess.run([IP, *call.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {call}: {done.stderr.strip()}")
        yield
    finally:
        for name in ("crc-a", "crc-b"):
            subprocess.run([IP, "netns", "del", name], capture_output=True)


def test_a_network_that_fails_ends_both_machines_and_the_run_goes_on(two_machines, place, here):
    def machine(rank):
        name = "ab"[rank]
        return start_rank(rank, 2, *TRAIN, cwd=place / name, port=29511, address="10.77.0.1", fault="waits",
                          in_rank=1, prefix=[IP, "netns", "exec", f"crc-{name}"], LOCAL_RANK=0, LOCAL_WORLD_SIZE=1,
                          GLOO_SOCKET_IFNAME=f"crc-v{name}")
    for name in "ab":  # nothing is shared: each machine has the tiles, and only the first one the run
        shutil.copytree(place, place / name, ignore=shutil.ignore_patterns("a", "b"))
    processes = [machine(0), machine(1)]
    while not (place / "b/reached").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    subprocess.run([IP, "-n", "crc-a", "link", "set", "crc-va", "down"], check=True)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 on " in errors[0] and "was killed, or its machine is down" in errors[0]
    assert "no answer from 10.77.0.1, where rank 0 runs" in errors[1] or "rank 0 on" in errors[1]
    assert not any((place / "b/runs").iterdir())
    assert here("train.py", "--resume", "runs/many", cwd=place / "a").returncode == 0
    assert_as_by_one(place / "a")
