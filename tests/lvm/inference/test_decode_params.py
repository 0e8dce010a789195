"""Parameters for decoding on a mesh; `test_generator.py` compares what they compute."""

import jax
import numpy as np

from lvm.hardware.sharding import MeshConfig, make_mesh
from lvm.inference import decode_params
from lvm.model.nnx_utils import init_params
from lvm.model.transformer import ModelConfig, Transformer

CONFIG = ModelConfig(
    hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, vocabulary_size=40, context=33, dtype="float32"
)


def test_decode_mesh_splits_batches_over_the_sequence_axis():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    merged = decode_params.decode_mesh(mesh)
    assert dict(merged.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    for sequence in range(2):
        np.testing.assert_array_equal(merged.devices[sequence, :, 0], mesh.devices[0, :, sequence])
    assert decode_params.decode_mesh(merged) is merged
    assert decode_params.decode_mesh(None) is None


def test_prepare_params_never_copies_a_whole_matrix_to_a_device(monkeypatch):
    copies, device_put = [], jax.device_put

    def record(x, sharding):
        copies.append((x.ndim, np.prod(sharding.shard_shape(x.shape)) / x.size))
        return device_put(x, sharding)

    params = jax.device_get(init_params(lambda rngs: Transformer(CONFIG, rngs), jax.random.key(0)))
    monkeypatch.setattr(jax, "device_put", record)
    prepared = decode_params.prepare_params(params, CONFIG, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    assert {share for ndim, share in copies if ndim == 4} == {1 / 8}  # attention's, of all layers
    up = prepared["layers"]["0"]["mlp"]["up"]
    assert (up.shape, up.sharding.shard_shape(up.shape)) == ((48, 32), (24, 8))
