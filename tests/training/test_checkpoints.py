"""Files that are not what they should be: refused with one ValueError that names them, before memory is spent."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from minidistill.metrics import classifier
from minidistill.networks import MLP, Denoiser, Generator
from minidistill.networks.unet import UNet
from minidistill.training import checkpoints
from tests.helpers import LargestTensor, small_denoiser, states_equal


def forged(path, change, weights=None, kind="denoiser"):
    """A model's file with a valid checksum, its recipe changed: a dict's entries, or the whole text."""
    own = {name: value.clone() for name, value in small_denoiser().network.state_dict().items()}
    recipe = {"network": small_denoiser().network.config, "sigma_data": 0.7, "info": {}}
    text = change if isinstance(change, str) else json.dumps({**recipe, **change})
    return checkpoints.write(path, own | (weights or {}), {"kind": kind, "recipe": text})


def in_the_old_way(path, tensors, info):
    """As files were written at first: text in any order, a checksum of names and bytes."""
    total = zlib.crc32(json.dumps(info, sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    path.write_bytes(save(tensors, metadata={**info, "crc32": str(total)}))


def test_saving_one_file_leaves_those_of_similar_names_alone(tmp_path):
    others = [tmp_path / "teacher-big-1-of-2.safetensors", tmp_path / "teacher-1-of-3.safetensors"]
    for other in others:
        other.write_text("another run's")
    checkpoints.save_model(tmp_path / "teacher.safetensors", small_denoiser())
    assert all(other.read_text() == "another run's" for other in others)


def test_equal_content_makes_equal_files(tmp_path):
    info = {f"key {i}": str(i) for i in range(20)} | {"kind": "samples"}
    made = [checkpoints.write(tmp_path / str(i), {"b": torch.ones(2), "a": torch.arange(3)}, info).read_bytes()
            for i in range(5)]
    assert len(set(made)) == 1
    tensors = load(made[0])  # what safetensors makes of it
    assert torch.equal(tensors["b"], torch.ones(2))
    assert torch.equal(tensors["a"], torch.arange(3))


@pytest.mark.parametrize("half", [False, True])
def test_a_model_in_half_precision_comes_back_rounded(tmp_path, half):
    torch.manual_seed(0)
    model, file = Denoiser(UNet((1, 8, 8), 32, (1, 2), 1), 0.5), tmp_path / "model.safetensors"
    assert checkpoints.save_model(file, model, half=half, seed=3) == file
    loaded, info = checkpoints.load_model(file)
    assert info == {"seed": 3}
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-10 if half else 0, atol=2**-24 if half else 0)  # float16's rounding


def test_files_written_in_the_old_way_are_read(tmp_path):
    file, model = tmp_path / "old.safetensors", small_denoiser()
    recipe = json.dumps({"network": model.network.config, "sigma_data": 0.7, "info": {"note": "old"}})
    in_the_old_way(file, model.network.state_dict(), {"kind": "denoiser", "recipe": recipe})
    loaded, info = checkpoints.load_model(file)
    assert states_equal(loaded.state_dict(), model.state_dict())
    assert info == {"note": "old"}
    assert checkpoints.read_info(file, "denoiser")["recipe"] == recipe
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for reads in (checkpoints.load_model, checkpoints.read_info):
        with pytest.raises(ValueError, match="corrupt"):
            reads(file)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_a_changed_type_in_the_header_is_noticed(tmp_path, dtype, old):
    """In new files by the checksum, in old ones, whose checksum is of the bytes alone, since weights are floating."""
    file = forged(tmp_path / "model.safetensors", {})
    if old:
        tensors, info = checkpoints.read(file)
        in_the_old_way(file, tensors, {"kind": info["kind"], "recipe": info["recipe"]})
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"F32"', f'"{dtype}"'.encode(), 1))
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        checkpoints.load_model(file)
    assert ("floating point" if old else "checksum") in str(caught.value)


@pytest.mark.parametrize(("value", "said"), [
    (torch.zeros(16, dtype=torch.int32), "network.outward.bias"), (torch.full((2,), torch.nan), "outward.bias"),
    (torch.full((2,), torch.inf), "outward.bias"), (torch.zeros(2, dtype=torch.int32), "holds whole numbers"),
])
def test_weights_that_are_no_finite_floating_numbers_are_refused(tmp_path, monkeypatch, value, said):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "check_finite", lambda *arguments: None)
        file = forged(tmp_path / "model.safetensors", {}, {"outward.bias": value})
    with pytest.raises(ValueError, match=said) as caught:
        checkpoints.load_model(file)
    assert str(file) in str(caught.value)


def test_whole_numbers_among_the_weights_stay_whole(tmp_path):
    """As the count of batches that a batch norm has seen."""
    weights = {"n": torch.tensor(12345678901), "x": torch.ones(2)}
    assert checkpoints.halved(tmp_path, weights)["n"].dtype == torch.int64
    read = checkpoints.read(checkpoints.write(tmp_path / "f", weights, {"kind": "k"}))[0]
    assert read["n"] == weights["n"]
    norm = torch.nn.BatchNorm1d(3)
    layout = checkpoints.layout_of(norm.state_dict())
    checkpoints.check_weights("f", "net", layout, norm)
    with pytest.raises(ValueError, match=r"num_batches_tracked holds floating point numbers; wanted whole"):
        checkpoints.check_weights("f", "net", layout | {"num_batches_tracked": ((), True)}, norm)


NETWORK = {"kind": "mlp", "shape": [2], "hidden": 16, "depth": 1, "n_classes": 0, "out_features": None,
           "activation": "silu"}
UNET = {"kind": "unet", "shape": [1, 8, 8], "channels": 32, "multipliers": [1, 2], "blocks": 2, "attention": [],
        "n_classes": 0, "dropout": 0.0}


@pytest.mark.parametrize("change", [
    {"hidden": 40_000}, {"depth": 10**8}, {"n_classes": 10**9}, {"shape": [10**6, 10**6]}, {"out_features": 10**12},
    {"hidden": 10**40}, {**UNET, "blocks": 10**8}, {**UNET, "channels": 2**20}, {**UNET, "multipliers": [1] * 10**6},
], ids=lambda change: str(change)[:60])
def test_a_small_file_that_asks_for_a_large_network_is_refused_before_it_is_built(tmp_path, change):
    file = forged(tmp_path / "model.safetensors", {"network": {**NETWORK, **change}})
    with LargestTensor() as seen, pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoints.load_model(file)
    assert seen.elements <= file.stat().st_size


@pytest.mark.parametrize("change", [
    "", "[]", "null", "{}", "[" * 100_000, '{"network": 3}', {"network": []}, {"network": {}},
    {"network": {**NETWORK, "kind": ["mlp"]}}, {"network": {**NETWORK, "kind": "resnet"}},
    {"network": {**NETWORK, "shape": 2}}, {"network": {**NETWORK, "shape": None}}, {"network": {**NETWORK, "more": 1}},
    {"network": {**NETWORK, "hidden": "16"}}, {"network": {**NETWORK, "depth": 1.5}},
    {"network": {**UNET, "channels": 3}}, {"network": {**UNET, "channels": 0}}, {"network": {**UNET, "multipliers": 0}},
    {"network": {"kind": "mlp"}}, {"sigma_data": "wide"}, {"sigma_data": -1}, {"sigma_data": None}, {"info": 3},
    {"info": None},
], ids=lambda change: str(change)[:60])
def test_any_other_text_under_a_valid_checksum_is_one_error_that_names_the_file(tmp_path, change):
    file = forged(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError) as caught:
        checkpoints.load_model(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"sigma_init": None}, {"sigma_init": 1.0, "levels": ["x"]},
                                    {"sigma_init": 1.0, "levels": [-1.0]}, {}])
def test_generators_too(tmp_path, change):
    file = forged(tmp_path / "model.safetensors", change, kind="generator")
    with pytest.raises(ValueError, match=r"model\.safetensors is malformed"):
        checkpoints.load_model(file)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"network": {"stages": 3}}', '{"network": {"shape": [3]}}',
                                  '{"network": {"n_classes": 1000000000}}', '{"network": {"stages": []}}'])
def test_classifiers_too(tmp_path, text):
    file = checkpoints.write(tmp_path / "judge", {"head.bias": torch.ones(3)}, {"kind": "classifier", "recipe": text})
    with pytest.raises(ValueError, match="judge"):
        classifier.load(file)


def test_a_files_size_is_looked_at_before_it_is_read(tmp_path):
    """A sparse file of 60 GB: with a small header, and with one that claims to be that long."""
    file = forged(tmp_path / "model.safetensors", {})
    os.truncate(file, 60 * 10**9)
    with pytest.raises(ValueError, match="truncated or corrupt: 60000000000 bytes"):
        checkpoints.load_model(file)
    with file.open("r+b") as stream:
        stream.write((59 * 10**9).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="60000000000 bytes"):
        checkpoints.read(file)


@pytest.mark.parametrize("header", [
    b"[" * 100_000, b"{}", b"[]", b"3", b'{"__metadata__": 3}', b'{"__metadata__": {"kind": 3, "checksum": "0"}}',
    b'{"a": {}}', b'{"a": 3}', b'{"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}', b"\xff\xfe",
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}',
], ids=lambda header: str(header)[:60])
def test_a_header_of_any_other_text_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoints.read(file)


def test_nothing_that_is_not_finite_is_written_and_the_old_file_stays(tmp_path):
    file = checkpoints.save_model(tmp_path / "model.safetensors", small_denoiser())
    before, broken = file.read_bytes(), small_denoiser()
    with torch.no_grad():
        broken.network.outward.bias[1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"model\.safetensors: outward\.bias has NaN or infinite values"):
        checkpoints.save_model(file, broken)
    with pytest.raises(FloatingPointError, match="samples"):
        checkpoints.write(file, {"samples": torch.full((3, 2), torch.nan)}, {"kind": "samples"})
    assert file.read_bytes() == before


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    model, file = small_denoiser(), tmp_path / "model.safetensors"
    with torch.no_grad():
        model.network.outward.bias[1] = -65_504.0
    checkpoints.save_model(file, model, half=True)
    before = file.read_bytes()
    with torch.no_grad():
        model.network.outward.bias[1] = -70_000.0
    with pytest.raises(FloatingPointError, match=r"outward\.bias reaches 70000, above float16's 65504"):
        checkpoints.save_model(file, model, half=True)
    assert file.read_bytes() == before
    judge = classifier.ConvClassifier((1, 4, 4), 2, ((4,),))
    with torch.no_grad():
        judge.head.bias[0] = 1e5
    with pytest.raises(FloatingPointError, match="above float16's"):
        classifier.save(file, judge)
    checkpoints.save_model(file, model)


@pytest.mark.parametrize("build", [
    lambda n: MLP((n(2),), hidden=n(8), depth=n(1)),
    lambda n: UNet((n(1), n(8), n(8)), channels=n(8), multipliers=[n(1), n(2)], blocks=n(1)),
])
def test_models_made_with_numpys_numbers_are_saved(tmp_path, build):
    model = Generator(Denoiser(build(np.int64), 0.5), 1.0)
    checkpoints.save_model(tmp_path / "m", model, n=np.int64(3), rate=np.float32(0.5), loss=torch.tensor(0.25))
    loaded, info = checkpoints.load_model(tmp_path / "m")
    assert states_equal(loaded.state_dict(), model.state_dict())
    assert info == {"n": 3, "rate": 0.5, "loss": 0.25}
    with pytest.raises(TypeError, match=r"info\.samples is Tensor of shape \(3,\); wanted a number"):
        checkpoints.save_model(tmp_path / "m", model, samples=torch.ones(3))


def test_looking_at_a_checkpoint_does_not_load_torchs_compiler(tmp_path):
    """Which takes seconds; nor does the command line load what few commands need."""
    checkpoints.save_model(tmp_path / "a.safetensors", Denoiser(UNet((1, 8, 8), channels=8, n_classes=3), 0.5))
    program = (
        "import sys; import minidistill.cli; from minidistill.training.checkpoints import load_model; "
        f"load_model({str(tmp_path / 'a.safetensors')!r}); "
        "dear = ('torch._dynamo', 'seaborn', 'scipy.stats', 'sklearn'); "
        "print([name for name in dear if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
