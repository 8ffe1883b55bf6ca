"""A cache gives whole, verified files to all processes of a machine, within its bound, whichever of
them is killed at any time.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest
from support.downloads import log_unforeseen, unforeseen
from support.servers import web_server

from bigmix.data.shards.cache import CacheFull, ShardCache
from bigmix.data.shards.prefetch import Ahead, FetchAhead, Needed
from bigmix.data.shards.retry import Changed, Retry, Watch
from bigmix.errors import BadInput, BigmixError

FAST = Retry(tries=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=1.0)
ROOM = 1 << 30


def content_of(index, size=1000):
    return random.Random(index).randbytes(size)


def ask(content):
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def server():
    with web_server() as server:
        for index in range(20):
            server.files[f"/{index}"] = content_of(index)
        server.files["/big"] = content_of("big", 2_000_000)
        yield server


@pytest.fixture
def start():
    """Start Python on a text with arguments; what still runs at the end of the test is killed."""
    started = []

    def start(text, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(text), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


PRELUDE = """
import hashlib, os, random, sys, time
from pathlib import Path
from bigmix.data.shards.cache import CacheFull, ShardCache
from bigmix.data.shards.retry import Retry
folder, url = Path(sys.argv[1]), sys.argv[2]
FAST = Retry(tries=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=1.0)
"""
GET = """
sha256, size, room = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
cache = ShardCache(folder, room, FAST)
lease = cache.get(url, size=size, sha256=sha256)
print(hashlib.sha256(lease.path.read_bytes()).hexdigest(), flush=True)
sys.stdin.read()
"""


def get(cache, server, index):
    return cache.get(f"{server.url}/{index}", **ask(server.files[f"/{index}"]))


def files_of(folder):
    """The files of content and the parts of them."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".shard", ".part"))


def shards_of(folder):
    """How many whole files the cache has."""
    return sum(name.endswith(".shard") for name in files_of(folder))


def paths_of(server):
    """The requested paths in order; a retry is one more request."""
    return [path for path, _, _ in server.requests]


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_file_is_downloaded_once_and_then_found(server, tmp_path):
    cache = ShardCache(tmp_path, ROOM, FAST)
    for _ in range(3):
        with get(cache, server, 1) as path:
            assert path.read_bytes() == content_of(1)
    # One download without a retry; two of the three found the file.
    assert paths_of(server) == ["/1"]
    wait_for(lambda: server.sent == [1000])
    assert get(ShardCache(tmp_path, ROOM, FAST), server, 1).path == path  # another run


def test_four_processes_that_ask_at_once_share_one_download(server, start, tmp_path):
    server.part_wait_s = 0.05
    asked = ask(server.files["/big"])
    arguments = (tmp_path, f"{server.url}/big", asked["sha256"], asked["size"], ROOM)
    answers = [
        process.stdout.readline().split() for process in [start(GET, *arguments) for _ in range(4)]
    ]
    assert answers == [[asked["sha256"]]] * 4
    assert paths_of(server) == ["/big"]


def test_threads_that_ask_at_once_share_one_download(server, tmp_path):
    server.part_wait_s = 0.01
    cache = ShardCache(tmp_path, ROOM, FAST)
    leases, waits_s = [], []

    def run():
        begin = time.monotonic()
        leases.append(get(cache, server, "big"))
        waits_s.append(time.monotonic() - begin)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({lease.path for lease in leases}) == 1
    # The other three found the file that they had waited for.
    assert paths_of(server) == ["/big"]
    assert len(waits_s) == 4 and min(waits_s) > 0.1


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("what was waited for did not come")


def test_a_download_that_was_killed_is_gone_on_with(server, start, tmp_path):
    server.part_wait_s = 0.05
    asked = ask(server.files["/big"])
    process = start(GET, tmp_path, f"{server.url}/big", asked["sha256"], asked["size"], ROOM)
    wait_for(lambda: any(tmp_path.glob("*.part")) and bytes_of(tmp_path) > 200_000)
    answers = []
    cache = ShardCache(tmp_path, ROOM, FAST)
    waiting = threading.Thread(target=lambda: answers.append(get(cache, server, "big")))
    waiting.start()
    time.sleep(0.2)
    assert not answers
    process.send_signal(signal.SIGKILL)
    waiting.join()
    assert answers[0].path.read_bytes() == server.files["/big"]
    assert len(server.requests) == 2
    assert int(server.requests[1][1].removeprefix("bytes=").removesuffix("-")) >= 200_000
    wait_for(lambda: len(server.sent) == 2)
    assert server.sent[-1] <= asked["size"] - 200_000
    assert len(files_of(tmp_path)) == 1


@pytest.mark.parametrize("left", [b"\0" * 500, b"\0" * 1000, b"\0" * 2000])
def test_a_part_of_other_content_is_begun_again_once(server, tmp_path, left):
    asked = ask(content_of(1))
    (tmp_path / f"{asked['sha256']}-1000.part").write_bytes(left)
    cache = ShardCache(tmp_path, ROOM, FAST)
    assert get(cache, server, 1).path.read_bytes() == content_of(1)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_flipped_byte_is_refused(server, tmp_path, resumed):
    asked = ask(content_of(1))
    if resumed:
        (tmp_path / f"{asked['sha256']}-1000.part").write_bytes(content_of(1)[:300])
    server.always = ("flip", 500)
    with pytest.raises(Changed, match="sha256") as caught:
        get(ShardCache(tmp_path, ROOM, FAST), server, 1)
    assert f"{server.url}/1" in str(caught.value)
    assert files_of(tmp_path) == []
    server.always = None
    assert get(ShardCache(tmp_path, ROOM, FAST), server, 1).path.read_bytes() == content_of(1)


def test_a_file_cut_short_in_the_cache_is_fetched_again(server, tmp_path):
    cache = ShardCache(tmp_path, ROOM, FAST)
    with get(cache, server, 1) as path:
        pass
    os.truncate(path, 10)
    assert get(cache, server, 1).path.read_bytes() == content_of(1)


def test_a_file_that_cannot_be_read_leaves_the_cache_usable(server, tmp_path):
    cache = ShardCache(tmp_path, ROOM, FAST)
    server.faults.extend([("truncate", 100), *[("status", 503, {})] * 2])
    with pytest.raises(BigmixError, match="3 tries in a row failed at byte 100"):
        get(cache, server, 1)
    with pytest.raises(BadInput, match="there is no file"):
        cache.get(f"{server.url}/none", **ask(b"none"))
    with get(cache, server, 1) as path:
        assert path.read_bytes() == content_of(1)
    assert paths_of(server) == ["/1"] * 3 + ["/none", "/1"]
    assert server.requests[-1][1] == "bytes=100-"


def test_who_waits_for_a_download_that_fails_fails_with_it_and_who_comes_later_tries_again(
    server, tmp_path
):
    """Eight ranks of a machine would else try a dead file one after the other, minutes each."""
    server.broken["/1"] = ("status", 500, {})
    slow = Retry(tries=3, first_wait_s=0.4, longest_wait_s=0.4, timeout_s=1.0)
    caches, reasons = [ShardCache(tmp_path, ROOM, slow) for _ in range(4)], []

    def fail(cache):
        with pytest.raises(BigmixError) as caught:
            get(cache, server, 1)
        reasons.append(str(caught.value))

    threads = [threading.Thread(target=fail, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 3 and len(set(reasons)) == 1 and "HTTP status 500" in reasons[0]
    fail(caches[0])
    assert len(server.requests) == 6
    server.broken = {}
    with get(caches[1], server, 1) as path:
        assert path.read_bytes() == content_of(1)
    assert not list(tmp_path.glob("*.failed"))


def test_what_was_not_used_for_longest_is_evicted(server, tmp_path):
    cache = ShardCache(tmp_path, 3500, FAST)
    for index in (1, 2, 3, 1, 4):
        get(cache, server, index).close()
    held = {path.read_bytes() for path in tmp_path.glob("*.shard")}
    assert held == {content_of(index) for index in (1, 3, 4)}
    assert paths_of(server) == ["/1", "/2", "/3", "/4"]


def test_what_is_in_use_is_never_evicted_and_a_full_cache_says_what_to_raise(server, tmp_path):
    cache = ShardCache(tmp_path, 3500, FAST)
    leases = [get(cache, server, index) for index in (1, 2, 3)]
    with pytest.raises(CacheFull, match=r"3,000 bytes are in use.*raise cache\.size to 4,000"):
        get(cache, server, 4)
    assert len(files_of(tmp_path)) == 3
    leases[1].close()
    get(cache, server, 4)
    assert [lease.path.exists() for lease in leases] == [True, False, True]


def test_a_file_that_can_never_fit_evicts_nothing(server, tmp_path):
    cache = ShardCache(tmp_path, 3500, FAST)
    get(cache, server, 1).close()
    with pytest.raises(CacheFull, match="2,000,000"):
        get(cache, server, "big")
    assert len(files_of(tmp_path)) == 1


def test_the_lease_of_another_process_counts_until_it_dies(server, start, tmp_path):
    asked = ask(content_of(1))
    process = start(GET, tmp_path, f"{server.url}/1", asked["sha256"], asked["size"], ROOM)
    assert process.stdout.readline()
    cache = ShardCache(tmp_path, 1500, FAST)
    with pytest.raises(CacheFull):
        get(cache, server, 2)
    process.kill()
    process.wait()
    assert get(cache, server, 2).path.read_bytes() == content_of(2)
    assert len(files_of(tmp_path)) == 1


def test_a_part_counts_as_the_whole_that_it_will_be_and_a_dead_one_is_evicted(
    server, start, tmp_path
):
    server.part_wait_s = 0.05
    asked = ask(server.files["/big"])
    process = start(GET, tmp_path, f"{server.url}/big", asked["sha256"], asked["size"], ROOM)
    wait_for(lambda: any(tmp_path.glob("*.part")) and bytes_of(tmp_path) > 0)
    cache = ShardCache(tmp_path, 2_000_500, FAST)
    with pytest.raises(CacheFull, match="2,000,000 bytes are in use"):
        get(cache, server, 1)
    process.kill()
    process.wait()
    get(cache, server, 1)
    assert not list(tmp_path.glob("*.part"))


RANDOM = """
sizes, room = eval(sys.argv[3]), int(sys.argv[4])
draw = random.Random(os.getpid())
cache = ShardCache(folder, room, FAST)
held = []
for _ in range(60):
    index = draw.randrange(len(sizes))
    content = random.Random(index).randbytes(sizes[index])
    try:
        sha256 = hashlib.sha256(content).hexdigest()
        lease = cache.get(f"{url}/{index}", size=len(content), sha256=sha256)
    except CacheFull:
        while held:
            held.pop()[0].close()
        continue
    held.append((lease, content))
    if len(held) > 2:
        held.pop(draw.randrange(3))[0].close()
    for lease, content in held:
        assert lease.path.read_bytes() == content
print("well", flush=True)
"""


def test_processes_at_random_stay_within_the_bound_and_read_what_they_asked_for(
    server, start, tmp_path
):
    sizes = [random.Random(index).randrange(1, 3000) for index in range(20)]
    server.files = {f"/{index}": content_of(index, size) for index, size in enumerate(sizes)}
    room = 12_000
    processes = [start(RANDOM, tmp_path, server.url, sizes, room) for _ in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        with suppress(FileNotFoundError):  # evicted between listing and looking
            most = max(most, bytes_of(tmp_path))
        time.sleep(0.005)
    assert [process.stdout.read() for process in processes] == ["well\n"] * 3
    assert 0 < most <= room


def test_a_full_disk_is_reported_and_harms_nothing_else(server, start, tmp_path):
    get(ShardCache(tmp_path, ROOM, FAST), server, 1).close()
    asked = ask(server.files["/big"])
    # A limit on the size of files is used in place of a small disk: both fail inside write.
    text = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    text += "try:" + textwrap.indent(GET, "    ") + "except Exception as error: print(error)"
    process = start(text, tmp_path, f"{server.url}/big", asked["sha256"], asked["size"], ROOM)
    output = process.communicate()[0]
    assert f"{server.url}/big" in output
    assert "could not be written to the cache" in output
    assert len(files_of(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_and_a_bad_checksum_are_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cache\.folder"):
        ShardCache(tmp_path / "file", ROOM)
    with pytest.raises(BadInput, match="64 hexadecimal digits"):
        ShardCache(tmp_path / "cache", ROOM).get("u", size=1, sha256="../../x")


def needed(server, index):
    return Needed(url=f"{server.url}/{index}", **ask(server.files.get(f"/{index}", b"none")))


@pytest.fixture
def ahead(server, tmp_path):
    """Make a FetchAhead over files of the server; it is closed at the end."""
    made = deque()

    def make(order, room=ROOM, **settings):
        cache = ShardCache(Path(tmp_path), room, FAST)
        made.append(
            FetchAhead(cache, (needed(server, index) for index in order), Ahead(**settings))
        )
        return made[-1], cache

    yield make
    for each in made:
        each.close()


def test_files_are_there_before_they_are_asked_for(server, ahead, tmp_path):
    fetch, _ = ahead([1, 2, 3, 4, 5, 1], files=3)
    wait_for(lambda: shards_of(tmp_path) == 3)
    time.sleep(0.1)
    assert len(server.requests) == 3
    for index in (1, 2, 3, 4, 5, 1):
        with fetch.take(needed(server, index)) as path:
            assert path.read_bytes() == content_of(index)
    assert len(server.requests) == 5
    with fetch.take(needed(server, 9)) as path:  # not in the order
        assert path.read_bytes() == content_of(9)


def test_the_bytes_ahead_are_bounded_but_one_file_always_goes_ahead(server, ahead, tmp_path):
    ahead([1, 2, 3, 4], files=10, bytes=2500)
    wait_for(lambda: shards_of(tmp_path) == 2)
    ahead(["big", 5], files=10, bytes=2500)
    wait_for(lambda: shards_of(tmp_path) == 3)
    time.sleep(0.1)
    assert shards_of(tmp_path) == 3 and sorted(paths_of(server)) == ["/1", "/2", "/big"]


def test_asking_for_a_file_on_its_way_waits_for_it(server, ahead):
    server.part_wait_s = 0.01
    fetch, _ = ahead(["big"])
    wait_for(lambda: server.requests)
    begin = time.monotonic()
    lease = fetch.take(needed(server, "big"))
    assert time.monotonic() - begin > 0.1
    assert lease.path.read_bytes() == server.files["/big"]
    assert len(server.requests) == 1


def test_a_fault_is_raised_where_its_file_is_taken_and_not_before(server, ahead):
    fetch, _ = ahead([1, "none", 2], files=3)
    wait_for(lambda: len(server.requests) == 3)
    fetch.take(needed(server, 1))
    with pytest.raises(BadInput, match="/none"):
        fetch.take(needed(server, "none"))
    assert fetch.take(needed(server, 2)).path.read_bytes() == content_of(2)


def test_files_that_are_passed_over_are_given_back(server, ahead, tmp_path):
    fetch, cache = ahead([1, 2, 3], room=3500, files=3)
    wait_for(lambda: shards_of(tmp_path) == 3)
    leases = [fetch.take(needed(server, 3)), get(cache, server, 4), get(cache, server, 5)]
    assert all(lease.path.exists() for lease in leases)


def test_files_ahead_make_room_for_the_one_that_is_needed_now(server, ahead):
    fetch, _ = ahead([1, 2, 3, 4, 5, 6], room=2500, files=4)
    for index in (1, 2, 3, 4, 5, 6):
        with fetch.take(needed(server, index)) as path:
            assert path.read_bytes() == content_of(index)


def test_files_ahead_make_room_also_for_one_that_is_not_among_them(server, ahead, tmp_path, caplog):
    log_unforeseen(caplog)
    server.part_wait_s = 0.05
    fetch, _ = ahead([1, 2, 3], room=2500, files=2)
    wait_for(lambda: shards_of(tmp_path) == 2)
    with fetch.take(needed(server, 9)) as path:
        assert path.read_bytes() == content_of(9)
    assert unforeseen(caplog) == 1
    for index in (1, 2, 3):
        with fetch.take(needed(server, index)) as path:
            assert path.read_bytes() == content_of(index)


def test_closing_stops_transfers_soon_and_keeps_what_they_had(server, ahead, tmp_path):
    server.part_wait_s = 0.2
    fetch, _ = ahead(["big", 1, 2, 3], threads=1)
    wait_for(lambda: server.requests)
    time.sleep(0.3)
    begin = time.monotonic()
    fetch.close()
    assert time.monotonic() - begin < 1
    assert [name.endswith(".part") for name in files_of(tmp_path)] == [True]


def test_a_watch_ends_the_wait_for_another_download(server, tmp_path):
    server.part_wait_s = 0.2
    cache = ShardCache(tmp_path, ROOM, FAST)
    first, second = Watch(), Watch()
    asked = {"url": f"{server.url}/big", **ask(server.files["/big"])}

    def get_and_ignore(watch):
        with pytest.raises(BigmixError):
            cache.get(**asked, watch=watch)

    threads = [threading.Thread(target=get_and_ignore, args=(watch,)) for watch in (first, second)]
    for thread in threads:
        thread.start()
        wait_for(lambda: server.requests)
    for watch, thread in zip((second, first), reversed(threads), strict=True):
        watch.stop()
        thread.join(1)
        assert not thread.is_alive()
