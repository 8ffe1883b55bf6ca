"""The sources of a recipe are opened in one way: what is wrong is named by the recipe's key."""

from support.corpora import write_source

from bigmix.data.recipe_sources import open_sources, tokenizer_faults
from bigmix.data.shards.retry import Retry


def test_sources_that_are_there_are_opened_and_the_others_are_faults(tmp_path):
    web = write_source(tmp_path / "web")
    empty = write_source(tmp_path / "empty", documents=0)
    paths = {"sources.web.path": str(web), "sources.b.path": "none", "held_out of c": str(empty)}
    opened = open_sources(paths, Retry(), verify=True)
    assert list(opened.sources) == [str(web)] and opened.notes == []
    missing, without = opened.faults
    assert missing.startswith("sources.b.path: none is not a prepared source")
    assert without.startswith(f"held_out of c: {empty} holds no document")


def test_damaged_shards_are_a_note_where_they_will_be_replaced_and_else_a_fault(tmp_path):
    web = write_source(tmp_path / "web", shards=3)
    (web / "shard-00001.tar").unlink()
    paths = {"sources.web.path": str(web), "held_out of web": str(web)}
    opened = open_sources(paths, Retry(), verify=False, replaceable=["sources.web.path"])
    (note,) = opened.notes
    assert note.startswith("sources.web.path: 1 of 3 shards are damaged")
    (fault,) = opened.faults
    assert fault.startswith("held_out of web: ") and "shard-00001.tar: the file is missing" in fault
    for path in web.glob("*.tar"):
        path.unlink()
    opened = open_sources(paths, Retry(), verify=False, replaceable=["sources.web.path"])
    assert opened.notes == [] and len(opened.faults) == 6


def test_only_a_check_of_the_content_sees_a_changed_byte(tmp_path):
    web = write_source(tmp_path / "web")
    content = bytearray((web / "shard-00000.tar").read_bytes())
    content[650] ^= 1
    (web / "shard-00000.tar").write_bytes(content)
    paths = {"sources.web.path": str(web)}
    assert open_sources(paths, Retry(), verify=False).faults == []
    (fault,) = open_sources(paths, Retry(), verify=True).faults
    assert "shard-00000.tar: its sha256 is not the manifest's" in fault


def test_a_source_of_another_tokenizer_is_named(tmp_path):
    paths = {
        f"sources.{name}.path": str(write_source(tmp_path / name, fingerprint=fingerprint * 64))
        for name, fingerprint in {"a": "f", "b": "f", "c": "0"}.items()
    }
    sources = open_sources(paths, Retry(), verify=False).sources
    (fault,) = tokenizer_faults(sources)
    assert fault.startswith(f"{tmp_path}/c: prepared with another tokenizer than {tmp_path}/a")
