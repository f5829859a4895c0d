"""Laws of safetensors folders: what is written is read; what lies, leads away or could run a program is refused."""

import json
import os
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from moe_jax.huggingface.shards import INDEX, SINGLE, Plan, json_object, open_folder, read, write_folder

VALUES = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "c.weight": np.linspace(-2, 2, 8).astype(np.float16),
    "d.weight": np.linspace(-2, 2, 9).reshape(3, 3).astype(ml_dtypes.float8_e4m3fn),
}


def write(folder, values=VALUES, shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    plans = [Plan(name, str(value.dtype), value.shape) for name, value in values.items()]
    assert [p.name for p in write_folder(folder, plans, values.__getitem__, shard_bytes)]
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    found = open_folder(write(tmp_path / "hf", shard_bytes=shard_bytes))
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        again = read(found[name])
        assert again.dtype == value.dtype
        np.testing.assert_array_equal(again.astype(np.float32), value.astype(np.float32))


def test_the_library_reads_what_is_written(tmp_path):
    with safe_open(write(tmp_path / "hf") / SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("a.weight"), VALUES["a.weight"])
        assert file.get_tensor("b.weight").tobytes() == VALUES["b.weight"].tobytes()


def test_files_are_no_larger_than_asked_for_and_the_index_adds_them_up(tmp_path):
    folder = write(tmp_path / "hf", shard_bytes=60)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in VALUES.values()) == 85
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_of_one_file_and_an_index_that_an_older_save_left_the_file_is_read(folder):
    newer = {name: value.astype(np.float32) + 1 for name, value in VALUES.items()}
    write(folder, newer)  # beside the two files and their index
    found = open_folder(folder)
    assert {entry.file.name for entry in found.values()} == {SINGLE}
    np.testing.assert_array_equal(read(found["a.weight"]), newer["a.weight"])
    for file in folder.glob("model-*"):
        file.unlink()
    assert open_folder(folder).keys() == VALUES.keys()


def test_files_without_an_index_are_refused_by_what_is_missing(folder):
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"has model-00001-of-00002\.safetensors and 1 more such files, but no model"):
        open_folder(folder)


def test_a_single_file_that_is_a_link_to_nowhere_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "hf")
    (folder / SINGLE).rename(folder / "other")
    (folder / SINGLE).symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not a file"):
        open_folder(folder)


@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_a_folder_that_does_not_hold_what_was_written_is_not_called_written(tmp_path, shard_bytes):
    (tmp_path / "hf").mkdir()
    plans = [Plan(name, str(value.dtype), value.shape) for name, value in VALUES.items()]

    def value(name):  # as a disk that loses what it took
        if name == plans[-1].name:
            sorted((tmp_path / "hf").glob("*.safetensors"))[0].unlink()
        return VALUES[name]

    with pytest.raises(OSError, match="cannot be read"):
        list(write_folder(tmp_path / "hf", plans, value, shard_bytes))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    """In two files."""
    return write(tmp_path / "hf", shard_bytes=60)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "a/b.safetensors", "..", ""])
def test_an_index_may_not_lead_out_of_its_folder(folder, name):
    change_index(folder, lambda places: places.update({"a.weight": name}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        open_folder(folder)


def test_a_link_may_not_lead_out_of_the_folder(folder):
    outside = folder.parent / "outside.safetensors"
    inside = folder / "model-00001-of-00002.safetensors"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is a link to .*outside"):
        open_folder(folder)


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot)
    blobs = tmp_path / "models--me--it" / "blobs"
    blobs.mkdir()
    (snapshot / SINGLE).rename(blobs / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert open_folder(snapshot).keys() == VALUES.keys()


def test_a_tensor_in_two_files_is_refused(folder):
    second = folder / "model-00002-of-00002.safetensors"
    write(folder / "more", {"a.weight": VALUES["a.weight"], "d.weight": VALUES["d.weight"]})
    (folder / "more" / SINGLE).rename(second)
    with pytest.raises(ValueError, match=r"a\.weight is in model-00001-of-00002\.safetensors and in model-00002"):
        open_folder(folder)


def test_an_index_that_names_a_tensor_that_its_file_lacks_is_refused(folder):
    change_index(folder, lambda places: places.update({"e.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"places e\.weight in model-00001-of-00002\.safetensors, which does not hold"):
        open_folder(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder):
    change_index(folder, lambda places: places.pop("a.weight"))
    with pytest.raises(ValueError, match=r"holds a\.weight, which .* does not place there"):
        open_folder(folder)


@pytest.mark.parametrize("places", [None, [], {}, {"a": 3}])
def test_an_index_of_another_form_is_refused(folder, places):
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="has no weight_map"):
        open_folder(folder)


def header_of(file):
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def lie(file, change):
    header, data = header_of(file)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


LIES = {
    "a larger shape": lambda h: h["a.weight"].update(shape=[300, 400]),
    "a negative shape": lambda h: h["a.weight"].update(shape=[-3, -4]),
    "offsets past the end": lambda h: h["a.weight"].update(data_offsets=[0, 10**12]),
    "offsets that overlap": lambda h: h["b.weight"].update(data_offsets=[0, 12]),
    "another dtype": lambda h: h["a.weight"].update(dtype="F64"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path, name):
    folder = write(tmp_path / "hf")
    lie(folder / SINGLE, LIES[name])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a sound safetensors file"):
        open_folder(folder)


def test_a_name_that_would_command_the_terminal_is_refused(tmp_path):
    folder = write(tmp_path / "hf")
    lie(folder / SINGLE, lambda h: h.update({"\x1b[2J": h.pop("a.weight")}))
    with pytest.raises(ValueError, match=r"'\\x1b\[2J' has unprintable characters"):
        open_folder(folder)


def test_integers_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "hf")
    lie(folder / SINGLE, lambda h: h["a.weight"].update(dtype="I32"))
    with pytest.raises(ValueError, match=r"tensor a\.weight is I32; known are"):
        open_folder(folder)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    file = write(tmp_path / "hf") / SINGLE
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        open_folder(tmp_path / "hf")


def test_a_header_larger_than_any_is_refused(tmp_path):
    file = write(tmp_path / "hf") / SINGLE
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        open_folder(tmp_path / "hf")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(tmp_path, name):
    hit = tmp_path / "hit"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / name).write_bytes(pickle.dumps(Bomb(hit)))
    with pytest.raises(ValueError, match=f"{name} is a pickle, which could run any program"):
        open_folder(tmp_path / "hf")
    (tmp_path / "hf" / SINGLE).write_bytes(pickle.dumps(Bomb(hit)))
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        open_folder(tmp_path / "hf")
    assert not hit.exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        json_object(tmp_path, "config.json")


def test_json_larger_than_any_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 2**40)
    with pytest.raises(ValueError, match="more than any such file"):
        json_object(tmp_path, "config.json")
