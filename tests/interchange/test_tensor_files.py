"""Files of tensors by themselves: sizes of shards, their names and index, and parts of what is stored."""

import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from bigmac_jax.config import ConfigError
from bigmac_jax.interchange import layout, tensor_files
from bigmac_jax.interchange.layout import Tensor
from bigmac_jax.interchange.tensor_files import DTYPES, INDEX, Checkpoint, Index, Spec


def whole(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Index]]:
    yield name, ()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("7B", 7), ("2KB", 2000), ("1.5kb", 1500), (" 3 MB ", 3_000_000), ("5GB", 5 * 10**9),
     ("2tb", 2 * 10**12)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert tensor_files.parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "0.9", "0KB", "-1", "5 G", "GB", "1.KB", "5GBs", ""])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size such as 5GB"):
        tensor_files.parse_size(text)


def test_shards_are_full_and_no_fuller() -> None:
    """A tensor that just fits goes into a shard, and one that is larger than any shard stands alone."""
    float32, bfloat16 = DTYPES["float32"], DTYPES["bfloat16"]
    specs = [Spec("a", (2, 1), float32), Spec("b", (1,), float32), Spec("c", (3, 2), bfloat16),
             Spec("d", (), bfloat16), Spec("e", (5,), bfloat16), Spec("f", (1,), bfloat16)]  # fmt: skip
    assert [spec.bytes for spec in specs] == [8, 4, 12, 2, 10, 2]

    def names(most: int) -> list[str]:
        return ["".join(spec.name for spec in shard) for shard in tensor_files.split_shards(specs, most)]

    assert names(12) == ["ab", "c", "de", "f"]
    assert names(11) == ["a", "b", "c", "d", "e", "f"]
    assert names(13) == ["ab", "c", "de", "f"]
    assert names(14) == ["ab", "cd", "ef"]
    assert names(1) == ["a", "b", "c", "d", "e", "f"]
    assert names(38) == ["abcdef"]


def test_shards_and_their_index(tmp_path: pathlib.Path) -> None:
    """Two shards have numbers from 1 and an index of all tensors and bytes; one has neither. Whoever may read the
    folder may read the files, and no file may be run."""
    float32, float16 = DTYPES["float32"], DTYPES["float16"]
    values = {"é": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(4, np.float32)}
    specs = [Spec("é", (3, 2), float32), Spec("b", (4,), float16)]
    (several := tmp_path / "several").mkdir()
    (one := tmp_path / "one").mkdir()
    os.chmod(several, 0o750)
    tensor_files.write_shards(several, tensor_files.split_shards(specs, 24), iter(values.values()))
    tensor_files.write_shards(one, tensor_files.split_shards(specs, 32), iter(values.values()))
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in several.iterdir()) == [*files, INDEX]
    assert [path.name for path in one.iterdir()] == ["model.safetensors"]
    text = (several / INDEX).read_text()
    assert json.loads(text) == {"metadata": {"total_size": 32}, "weight_map": dict(zip("éb", files, strict=True))}
    assert '\n  "weight_map"' in text and "é" in text and text.endswith("}\n")
    assert (several / files[0]).stat().st_mode & 0o777 == 0o640
    with safe_open(one / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers refuses it
        assert file.get_slice("b").get_dtype() == "F16"
    for folder in (several, one):
        checkpoint = Checkpoint(folder, whole)
        assert checkpoint.names() == {"é", "b"} and "é" in checkpoint and "a" not in checkpoint
        for name, value in values.items():
            np.testing.assert_array_equal(checkpoint.read(name), value)
            assert checkpoint.read(name).dtype == np.float32


def test_a_directory_is_whole_or_not_there(tmp_path: pathlib.Path) -> None:
    """Folders above it are made, an empty one is taken, and an error leaves none beside it."""
    output = tmp_path / "new" / "folders" / "out"
    with tensor_files.whole_or_nothing(output) as directory:
        assert directory.parent == output.parent and not output.exists()
        (directory / "file").write_text("text")
    assert (output / "file").read_text() == "text" and [*output.parent.iterdir()] == [output]
    with pytest.raises(ConfigError, match="is there already"), tensor_files.whole_or_nothing(output):
        pass
    (empty := tmp_path / "empty").mkdir()
    tensor_files.check_new(empty)
    with pytest.raises(ConfigError, match="is there already"):
        tensor_files.check_new(output / "file")
    with pytest.raises(KeyError), tensor_files.whole_or_nothing(empty) as directory:
        (directory / "file").write_text("text")
        raise KeyError
    assert [*empty.iterdir()] == [] and sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_parts_of_stored_tensors(tmp_path: pathlib.Path) -> None:
    """Fused experts are found under the name of each, with its shape and numbers; what is left out is said once."""
    both, down = np.arange(36.0, dtype=np.float32).reshape(2, 6, 3), np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)
    save_file({"l.experts.gate_up_proj": both, "l.experts.down_proj": down, "mtp.x": down[0], "l.y": down[1]},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / INDEX).write_text("of an older save")  # which transformers does not read either
    checkpoint = Checkpoint(tmp_path, layout.split_experts)
    for expert in range(2):
        name = f"l.experts.{expert}"
        wanted = {"gate_proj": both[expert, :3], "up_proj": both[expert, 3:], "down_proj": down[expert]}
        for matrix, value in wanted.items():
            assert checkpoint.shape(f"{name}.{matrix}.weight") == value.shape
            np.testing.assert_array_equal(checkpoint.read(f"{name}.{matrix}.weight"), value)
            part = checkpoint.read(f"{name}.{matrix}.weight", (slice(1, 3), slice(0, 1)))
            np.testing.assert_array_equal(part, value[1:3, :1])
    np.testing.assert_array_equal(checkpoint.read("l.y", (slice(1, 2),)), down[1, 1:2])
    assert len(checkpoint.names()) == 8
    checkpoint.leave_out("l.experts")
    checkpoint.leave_out("mtp.")
    assert checkpoint.names() == {"l.y"}
    assert sorted(checkpoint.left_out) == ["l.experts.down_proj", "l.experts.gate_up_proj", "mtp.x"]
    for shape in [(2, 6), (2, 6, 3, 1), (0, 6, 3), (2, 0, 3), (2, 6, 0)]:
        assert [*layout.split_experts("l.experts.up_proj", shape)] == [("l.experts.up_proj", ())]
    assert [*layout.split_experts("l.up_proj", (2, 6, 3))] == [("l.up_proj", ())]


def test_shapes_in_files() -> None:
    """A layer's and an expert's dimension are not in the files; of parts one behind the other the last one's end is."""
    leaves = {name: np.empty(shape) for name, shape in {"a": (4, 2, 3), "b": (4, 5, 3), "e": (4, 8, 2, 3), "t": (2, 3),
                                                        "k": (4, 7, 5)}.items()}  # fmt: skip
    parts = [Tensor("ab", "a", 1), Tensor("ab", "b", 1)]
    tensors = [*layout.one_behind_the_other(leaves, parts), Tensor("e", "e", 0, 0), Tensor("t", "t", transposed=True),
               Tensor("k", "k", 0, depthwise=True), Tensor("z", "", shape=(9, 1))]  # fmt: skip
    assert [tensor.rows for tensor in tensors[:2]] == [slice(0, 2), slice(2, 7)]
    assert layout.stored_shapes(tensors, leaves) == {"ab": (7, 3), "e": (2, 3), "t": (3, 2), "k": (5, 1, 7),
                                                     "z": (9, 1)}  # fmt: skip


def test_fields_of_config_json_by_their_present_names() -> None:
    """A null is as good as no field. The other name of a field counts before its own, and dtype before torch_dtype."""
    defaults, names = {"size": 1, "kept": 2, "dtype": "float32"}, {"n_size": "size"}
    given = {"size": 3, "n_size": 4, "kept": None, "torch_dtype": "float16"}
    assert layout.fill_json(given, defaults, names) | {"n_size": 0, "torch_dtype": 0} == {
        "size": 4, "kept": 2, "dtype": "float16", "n_size": 0, "torch_dtype": 0,
    }  # fmt: skip
    later = layout.fill_json({"dtype": "bfloat16", "torch_dtype": "float16"}, defaults, names)
    assert later["dtype"] == "bfloat16" and later["size"] == 1
