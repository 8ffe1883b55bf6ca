"""Whatever a server does, all bytes that are read are those of the file, or there is an error that
names it.
"""

import logging
import random

import pytest
from support.servers import s3_server, web_server

from bigmix.data.shards import storage
from bigmix.data.shards.location import location_of, shown
from bigmix.data.shards.retry import Changed, Retry, Stopped, Watch
from bigmix.data.shards.storage import copy_to, read_file, read_range
from bigmix.errors import BadInput, BigmixError

FAST = Retry(tries=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=0.3)
CONTENT = random.Random(0).randbytes(300_000)
BREAKS = [
    ("reset", 100_000),
    ("truncate", 70_001),
    ("stall", 50_000),
    ("reset", 0),
    ("truncate", 0),
]


@pytest.fixture
def server():
    with web_server() as server:
        server.files["/d/a.tar"] = CONTENT
        yield server


@pytest.fixture(scope="module")
def bucket():
    with s3_server("bucket") as system:
        yield system


def location_cases():
    two = ("s-08.tar", "s-09.tar", "s-10.tar")
    return [
        ("data/web", "data/web/a.tar", None),
        ("data/web/", "data/web/a.tar", None),
        ("data/web/manifest.json", "data/web/a.tar", None),
        ("manifest.json", "./a.tar", None),
        ("/", "/a.tar", None),
        ("file:///data/my%20web", "/data/my web/a.tar", None),
        ("data/s-{08..10}.tar", "data/a.tar", two),
        ("s-{08..10}.tar", "a.tar", two),
        ("s3://bucket/d", "s3://bucket/d/a.tar", None),
        ("gs://bucket/d/manifest.json", "gs://bucket/d/a.tar", None),
        ("hf://datasets/u/d@main/x", "hf://datasets/u/d@main/x/a.tar", None),
        ("https://h/d?sig=a/b&c=%2F", "https://h/d/a.tar?sig=a/b&c=%2F", None),
        ("https://h/d/manifest.json?sig=1", "https://h/d/a.tar?sig=1", None),
        ("https://h/d/s-{08..10}.tar?sig=1", "https://h/d/a.tar?sig=1", two),
        (
            "https://h/d/{a,b}-{1..2}.tar",
            "https://h/d/a.tar",
            ("a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"),
        ),
        ("pipe:ssh h cat /d/{}", "pipe:ssh h cat /d/a.tar", None),
        ("pipe:cat /d/{}.gz | gunzip # {}", "pipe:cat /d/a.tar.gz | gunzip # a.tar", None),
        (
            "pipe:curl -s 'https://h/d/s-{08..10}.tar?k=1'",
            "pipe:curl -s 'https://h/d/a.tar?k=1'",
            two,
        ),
    ]


@pytest.mark.parametrize(("path", "address", "names"), location_cases())
def test_a_path_gives_the_address_of_each_file(path, address, names):
    location = location_of(path)
    assert location.url("a.tar") == address
    assert location.names == names
    assert location.is_local == ("://" not in address and not address.startswith("pipe:"))


@pytest.mark.parametrize(
    "path",
    ["pipe:cat /d/a.tar", "s3://b/{a,b}/s.tar", "d/s-{5..3}.tar", "d/s-{0..9999999999}.tar"],
)
def test_a_path_that_selects_nothing_is_refused(path):
    with pytest.raises(BadInput):
        location_of(path)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/../../b", ""])
def test_a_file_outside_the_folder_is_refused(name):
    with pytest.raises(BadInput, match="below its own folder"):
        location_of("s3://b/d").url(name)


def test_a_name_is_quoted_for_the_web_and_never_reaches_a_shell():
    assert location_of("https://h/d").url("a b?.tar") == "https://h/d/a%20b%3F.tar"
    with pytest.raises(BadInput, match="in a pipe"):
        location_of("pipe:cat {}").url("a; rm b")


def test_messages_show_no_password_and_no_signature():
    assert shown("https://me:secret@h/d/a?sig=secret") == "https://h/d/a?..."


def test_the_waits_double_up_to_the_longest():
    retry = Retry(tries=9, first_wait_s=1, longest_wait_s=5)
    waits = [retry.wait_s(failures, "u") for failures in range(1, 6)]
    for wait, full in zip(waits, [1, 2, 4, 5, 5], strict=True):
        assert full / 2 <= wait <= full
    assert waits == [retry.wait_s(failures, "u") for failures in range(1, 6)]


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("fault", BREAKS)
def test_an_answer_that_breaks_off_is_completed(server, fault, tags, tmp_path):
    server.knows_tags = tags
    server.faults.extend([fault, None, fault, fault])
    watch = Watch()
    assert read_file(f"{server.url}/d/a.tar", retry=FAST, watch=watch) == CONTENT
    assert watch.retries == 1
    assert watch.bytes == len(CONTENT)
    assert server.requests[-1][1] == (f"bytes={fault[1]}-" if fault[1] else None)
    copy_to(f"{server.url}/d/a.tar", tmp_path / "a", size=len(CONTENT), retry=FAST, watch=watch)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_random_faults_in_a_row_leave_the_content_whole(server):
    draw = random.Random(1)
    for _ in range(20):
        server.knows_ranges = draw.random() < 0.7
        server.faults.extend(
            (draw.choice(["reset", "truncate"]), draw.randrange(1, 200_000))
            for _ in range(draw.randrange(3))
        )
        start = draw.randrange(len(CONTENT))
        stop = draw.randrange(start, len(CONTENT) + 1)
        given = read_range(f"{server.url}/d/a.tar", start, stop, retry=FAST)
        assert given == CONTENT[start:stop]
        server.faults.clear()


def test_progress_gives_the_tries_back(server):
    server.faults.extend([("truncate", 20_000)] * 14)
    assert read_file(f"{server.url}/d/a.tar", retry=FAST) == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status, caplog):
    server.faults.extend([("status", status, {})] * 2)
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        assert read_file(f"{server.url}/d/a.tar", retry=FAST, watch=watch) == CONTENT
    assert watch.retries == 2
    assert [f"HTTP status {status}" in record.getMessage() for record in caplog.records] == [
        True
    ] * 2


def test_a_server_gets_the_wait_that_it_asks_for(server, monkeypatch):
    waits = []
    monkeypatch.setattr(Watch, "pause", lambda self, seconds: waits.append(seconds))
    server.faults.append(("status", 429, {"Retry-After": "7"}))
    assert read_file(f"{server.url}/d/a.tar", retry=FAST) == CONTENT
    assert max(waits) == 7


@pytest.mark.parametrize(
    ("status", "word"), [(404, "no file"), (410, "no file"), (403, "may not"), (401, "may not")]
)
def test_what_no_try_will_change_is_reported_at_once(server, status, word):
    server.always = ("status", status, {})
    with pytest.raises(BadInput, match=word) as caught:
        read_file(f"{server.url}/d/a.tar?sig=secret", retry=FAST)
    assert f"{server.url}/d/a.tar" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault", [("reset", 0), ("truncate", 0), ("stall", 0), ("status", 503, {})]
)
def test_a_file_that_always_fails_ends_after_the_tries(server, fault):
    server.faults.append(("truncate", 1000))
    server.faults.extend([fault] * 10)
    with pytest.raises(BigmixError, match="3 tries in a row failed at byte 1000") as caught:
        read_file(f"{server.url}/d/a.tar", retry=FAST)
    assert f"{server.url}/d/a.tar" in str(caught.value)
    assert len(server.requests) == 3


def test_an_unreachable_server_ends_after_the_tries(server):
    server.close()
    with pytest.raises(BigmixError, match="3 tries in a row failed at byte 0"):
        read_file(f"{server.url}/d/a.tar", retry=FAST)


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_in_between_is_refused(server, tags):
    server.knows_tags = tags
    other = CONTENT[::-1] if tags else CONTENT + b"longer"  # without a tag only the size shows it
    server.faults.append(("replace", "/d/a.tar", other))
    with pytest.raises(Changed):
        read_file(f"{server.url}/d/a.tar", retry=FAST)


def test_a_file_of_another_size_than_listed_is_refused(server, tmp_path):
    with pytest.raises(Changed, match="300000 bytes, expected were 300001"):
        copy_to(f"{server.url}/d/a.tar", tmp_path / "a", size=300_001, retry=FAST)


def test_without_a_length_only_a_known_size_is_taken_for_whole(server, tmp_path):
    server.sends_length = False
    with pytest.raises(BigmixError, match="without its length"):
        read_file(f"{server.url}/d/a.tar", retry=FAST)
    server.faults.append(("truncate", 5000))
    copy_to(f"{server.url}/d/a.tar", tmp_path / "a", size=len(CONTENT), retry=FAST)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_copy_goes_on_where_an_earlier_one_ended(server, tmp_path):
    (tmp_path / "a").write_bytes(CONTENT[:123_456])
    copy_to(f"{server.url}/d/a.tar", tmp_path / "a", size=len(CONTENT), retry=FAST)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert server.requests[0][1] == "bytes=123456-"


def test_a_password_in_a_url_and_a_query_reach_the_server(server):
    url = server.url.replace("//", "//me:a%40b@") + "/d/a.tar?sig=1%2F2"
    assert read_range(url, 5, 9, retry=FAST) == CONTENT[5:9]
    assert server.requests == [("/d/a.tar?sig=1%2F2", "bytes=5-8", "Basic bWU6YUBi")]


def test_a_redirect_is_followed_with_the_range(server):
    server.faults.append(("status", 302, {"Location": f"{server.url}/d/a.tar"}))
    assert read_range(f"{server.url}/moved", 5, 9, retry=FAST) == CONTENT[5:9]


def test_a_watch_stops_a_transfer(server):
    watch = Watch()
    watch.stop()
    with pytest.raises(Stopped):
        read_file(f"{server.url}/d/a.tar", retry=FAST, watch=watch)


def test_an_empty_file_is_whole(server, tmp_path):
    server.files["/d/empty"] = b""
    (tmp_path / "empty").touch()
    assert read_file(f"{server.url}/d/empty", retry=FAST) == b""
    assert read_file(str(tmp_path / "empty"), retry=FAST) == b""
    assert read_file("pipe:true", retry=FAST) == b""


def test_a_local_file_and_a_file_url_are_read(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    assert read_file(str(tmp_path / "a")) == CONTENT
    assert read_range(f"file://{tmp_path}/a", 10, 20) == CONTENT[10:20]
    for gone in ("b", "a/b"):
        with pytest.raises(BadInput, match="there is no file"):
            read_file(str(tmp_path / gone), retry=FAST)


def test_s3_gives_whole_files_and_ranges(bucket, tmp_path):
    content = CONTENT * 60  # above two blocks
    with bucket.open_output_stream("bucket/d/a b.tar") as out:
        out.write(content)
    location = location_of("s3://bucket/d")
    assert read_file(location.url("a b.tar"), retry=FAST_S3) == content
    assert read_range(location.url("a b.tar"), 1000, 2000, retry=FAST_S3) == content[1000:2000]
    (tmp_path / "a").write_bytes(content[:9_000_000])
    copy_to(location.url("a b.tar"), tmp_path / "a", size=len(content), retry=FAST_S3)
    assert (tmp_path / "a").read_bytes() == content


def test_a_missing_s3_object_and_bucket_are_reported_at_once(bucket):
    for url in ("s3://bucket/none", "s3://nobucket/a"):
        with pytest.raises(BadInput, match="there is no file") as caught:
            read_file(url, retry=FAST_S3)
        assert url in str(caught.value)


@pytest.fixture
def s3_at(server, monkeypatch):
    """The environment that makes the failing web server the S3 server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    storage._s3.cache_clear()
    yield server
    storage._s3.cache_clear()


@pytest.mark.parametrize("status", [None, 500, 503])
def test_s3_that_fails_is_asked_again_until_the_tries_are_spent(s3_at, status):
    if status is None:
        s3_at.close()
    s3_at.always = ("status", status, {})
    watch = Watch()
    with pytest.raises(BigmixError, match="3 tries in a row failed at byte 0"):
        read_file("s3://bucket/d/a.tar", retry=FAST_S3, watch=watch)
    assert watch.retries == 2


@pytest.mark.parametrize("status", [401, 403])
def test_s3_that_refuses_is_asked_once(s3_at, status):
    s3_at.always = ("status", status, {})
    with pytest.raises(BadInput, match="may not be read"):
        read_file("s3://bucket/d/a.tar", retry=FAST_S3)
    assert len(s3_at.requests) == 1


@pytest.mark.parametrize("fault", [("reset", 100_000), ("truncate", 70_001), ("stall", 50_000)])
def test_s3_that_breaks_off_is_completed(s3_at, fault):
    s3_at.files["/bucket/d/a.tar"] = CONTENT
    s3_at.faults.extend([None, fault])  # the first answer is to HEAD
    watch = Watch()
    assert read_file("s3://bucket/d/a.tar", retry=FAST_S3, watch=watch) == CONTENT
    assert watch.retries == 1


FAST_S3 = Retry(tries=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=2)


def test_a_pipe_is_read_and_resumed(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    # The first run prints a part and fails, as ssh does when the line drops.
    flaky = (
        f"cd {tmp_path}; test -e ran || {{ touch ran; head -c 1000 a.tar; exit 255; }}; cat {{}}"
    )
    watch = Watch()
    url = location_of(f"pipe:{flaky}").url("a.tar")
    assert read_file(url, retry=FAST, watch=watch) == CONTENT
    assert watch.retries == 1
    assert read_range(f"pipe:cat {tmp_path}/a.tar", 7, 70_000, retry=FAST) == CONTENT[7:70_000]
    assert read_range("pipe:yes", 1, 4, retry=FAST) == b"\ny\n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo part; echo the reason >&2; exit 3", "exit code 3: the reason"),
        ("(echo part; exit 4) | cat", "exit code 4: no message"),
        ("echo part; sleep 9", "printed nothing for 0.3 s"),
        ("no-such-command", "cannot be run"),
    ],
)
def test_a_command_that_fails_is_an_error_with_its_last_words(command, reason):
    with pytest.raises(BigmixError, match=reason):
        read_file(f"pipe:{command}", retry=FAST)


def test_a_pipe_of_another_length_than_listed_is_refused(tmp_path):
    with pytest.raises(Changed, match="more than 3 bytes"):
        copy_to("pipe:printf abcd", tmp_path / "a", size=3, retry=FAST)
    with pytest.raises(BigmixError, match="ended 3 bytes early"):
        copy_to("pipe:printf ab", tmp_path / "b", size=5, retry=FAST)


def test_other_schemes_go_through_fsspec():
    import fsspec

    fsspec.filesystem("memory").pipe("/d/a.tar", CONTENT)
    assert read_range(location_of("memory://d").url("a.tar"), 3, 90_000) == CONTENT[3:90_000]
    with pytest.raises(BadInput, match="there is no file"):
        read_file("memory://d/none", retry=FAST)
    with pytest.raises(BadInput, match="what fsspec knows"):
        read_file("gopher7://d/a", retry=FAST)
