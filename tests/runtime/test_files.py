"""Laws of paths and locks: a name is a local path or is refused, and a file system without locks ends no run."""

import errno
import fcntl
import os

import pytest

from moe_jax.config.paths import path_of, workdir_of
from moe_jax.data import prepare
from moe_jax.runtime.files import lock, new_folder, output_of, write_whole
from moe_jax.runtime.workdir import claim

ADDRESSES = {
    "s3://bucket/run": "mount them",
    "hdfs://host/run": "mount them",
    "https://host/run": "mount them",
    "s3:/bucket/run": "mount them",
    "file:///tmp/run": "write the path alone, /tmp/run",
    "file:/tmp/run": "write the path alone, /tmp/run",
    "gs:/bucket/run": "written gs://bucket/run",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_is_refused_with_a_remedy(text):
    for function in (path_of, workdir_of, output_of):
        with pytest.raises(ValueError, match=r"^--here=.* is an address and must be a path of this machine") as caught:
            function(text, "--here")
        assert ADDRESSES[text] in str(caught.value)


@pytest.mark.parametrize(
    "text", ["a:b", "runs/lr:1e-3/x", "x:", "./s3:/bucket", "C:x", "a b", "[x]", "%20", "#1", "..."]
)
def test_a_path_that_resembles_an_address_is_a_path(text):
    assert str(path_of(text, "--here")) == text.removeprefix("./")
    assert workdir_of(text) == path_of(text, "--workdir")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(path_of("~/run", "--here")) == "/home/someone/run"
    assert str(workdir_of("~")) == "/home/someone"
    assert str(path_of("./~/run", "--here")) == "~/run"
    assert str(path_of("a~", "--here")) == "a~"
    with pytest.raises(ValueError, match=r"~no_such_user_here/x begins with a user's home folder, and there is none"):
        path_of("~no_such_user_here/x", "--here")


@pytest.mark.parametrize("name", ["a\\b", "logs:", "gs:", os.fsdecode(b"caf\xe9")])
def test_a_folder_that_checkpoints_would_miss_is_refused(tmp_path, name, monkeypatch):
    with pytest.raises(ValueError, match=r"^--workdir=.* cannot hold checkpoints.*another folder, or a link"):
        workdir_of(str(tmp_path / name / "run"))
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    workdir_of(str(tmp_path / "link" / "run"))
    path_of(str(tmp_path / name), "data.path")  # other files can be there
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ValueError, match="cannot hold checkpoints"):
        workdir_of("run")


@pytest.mark.parametrize("folder", ["/gs/x", "/s3/x", "/az/x", "/hf/x"])
def test_a_folder_that_orbax_takes_for_a_bucket_is_refused(folder):
    with pytest.raises(ValueError, match="cannot hold checkpoints"):
        workdir_of(folder)
    workdir_of(f"/mnt{folder}")


# --- locks ----------------------------------------------------------------------------------------------------


def without_locks(monkeypatch, number):
    """A file system whose flock fails with this error: Lustre without -o flock, NFS without lockd, FUSE."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_written_to(tmp_path, monkeypatch, capsys, number):
    without_locks(monkeypatch, number)
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("text")
    assert (tmp_path / "new" / "file").read_text() == "text"
    warning = capsys.readouterr().err
    assert f"warning: the file system of {tmp_path}" in warning
    assert os.strerror(number) in warning


def test_runs_and_corpora_are_written_without_locks(tmp_path, monkeypatch, capsys):
    without_locks(monkeypatch, errno.ENOLCK)
    with claim(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    (tmp_path / "texts" / "a").mkdir(parents=True)
    for name in ("1.txt", "2.txt"):
        (tmp_path / "texts" / "a" / name).write_text(f"text {name}")
    prepare.prepare(prepare.Options(tmp_path / "texts", tmp_path / "corpus"))
    assert (tmp_path / "corpus" / "manifest.json").is_file()
    warnings = capsys.readouterr().err.splitlines()
    assert [str(tmp_path / name) in line for name, line in zip(("run", "corpus"), warnings, strict=True)] == [
        True,
        True,
    ]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(OSError, match=r"taken\.json"):
        write_whole(tmp_path / "taken.json", "text")
    assert [f.name for f in tmp_path.iterdir()] == ["taken.json"]


def test_other_failures_of_a_lock_are_raised(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match="Input/output"):
        lock(file, tmp_path, "held")


def test_the_second_process_is_refused(tmp_path):
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file", "w") as two:
        lock(one, tmp_path, "held by the first")
        with pytest.raises(ValueError, match=r"^held by the first$"):
            lock(two, tmp_path, "held by the first")
