"""The weights of FID's Inception network: read safely, all or nothing, and the same afterwards."""

from __future__ import annotations

import flax.traverse_util as traverse
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import cli, tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.interop import inception
from kaleido_jax.models.inception import resize


def torch_state() -> dict[str, np.ndarray]:
    """Numbered weights in PyTorch's names and axes."""
    found = {}
    for number, (path, shape) in enumerate(inception.shapes().items()):
        turned = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape[::-1])
        found[inception.torch_name(path)] = np.full(turned, number, np.float32)
    found["fc.weight"] = np.arange(1008 * 2048, dtype=np.float32).reshape(1008, 2048)
    kernel = found["Mixed_6b.branch7x7_2.conv.weight"]
    found["Mixed_6b.branch7x7_2.conv.weight"] = np.arange(kernel.size, dtype=np.float32).reshape(
        kernel.shape
    )
    return found


def test_an_import_holds_what_the_file_holds(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="the weights file is PyTorch's")
    state = torch_state()
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(tensors, tmp_path / "weights.pth")
    folder = tmp_path / "inception"
    words = ["import", "inception", str(tmp_path / "weights.pth"), str(folder)]
    assert cli.main(words) == 0
    assert cli.main(words) == 2  # it is there already
    variables, digest = inception.load_inception(folder)
    assert len(digest) == 16
    params = variables["params"]
    assert np.array_equal(params["fc"]["kernel"], state["fc.weight"].T)
    # [out, in, height, width] is [height, width, in, out] here, and 1 x 7 stays 1 high.
    kernel = params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    assert kernel.shape[:2] == (1, 7)
    theirs = state["Mixed_6b.branch7x7_2.conv.weight"]
    assert np.array_equal(kernel[0, 3], theirs[:, :, 0, 3].T)
    flat = traverse.flatten_dict(variables)
    for path, value in flat.items():
        if value.ndim == 1:
            assert np.array_equal(value, state[inception.torch_name(path)]), path

    weights = folder / inception.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: inception\.safetensors differs"):
        inception.load_inception(folder)
    with pytest.raises(UserError, match="kaleido import inception"):
        inception.load_inception(tmp_path)


def test_another_network_is_refused_whole(tmp_path):
    state = torch_state()
    del state["fc.bias"]
    state["fc.weight"] = state["fc.weight"][:1000]
    state["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    tensor_files.write(tmp_path / "weights.safetensors", state)
    with pytest.raises(UserError) as caught:
        inception.import_inception(tmp_path / "weights.safetensors", tmp_path / "out")
    line = str(caught.value)
    for part in (
        "fc.bias [1008] is missing",
        "fc.weight is [1000, 2048], should be [1008, 2048]",
        "AuxLogits.fc.weight is unknown",
    ):
        assert part in line
    assert not (tmp_path / "out").exists()


def test_resizing_keeps_the_first_pixel_in_place():
    ramp = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 4, 1))
    out = np.asarray(resize(ramp, 8))[0, :, 0, 0]
    # out[i] is read at i / 2; beyond the last pixel there is the last pixel.
    assert np.allclose(out, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert np.array_equal(np.asarray(resize(ramp, 4)), np.asarray(ramp))
    assert np.allclose(np.asarray(resize(ramp, 2))[0, :, 0, 0], [0, 2])  # no smoothing
