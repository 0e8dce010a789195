"""NNX modules as nested dicts of arrays, and back."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lvm.model import nnx_utils


class Block(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 4)), axes=("embed", "mlp"))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(11)])
        self.bias = nnx.Param(jnp.zeros(4), axes=(None,))

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0)
        def stack(layer_rngs):
            return Block(layer_rngs)

        self.stacked = stack(rngs)

    def __call__(self, x):
        return sum(x @ block.kernel[...] * i for i, block in enumerate(self.blocks)) + self.bias[...]


def test_split_gives_nested_dict_with_string_keys():
    _, params = nnx_utils.split(Net(nnx.Rngs(0)))
    assert set(params) == {"blocks", "bias", "stacked"}
    assert set(params["blocks"]) == {str(i) for i in range(11)}
    assert params["blocks"]["3"]["kernel"].shape == (3, 4)
    assert params["stacked"]["kernel"].shape == (2, 3, 4)


def test_merge_inverts_split_under_jit():
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 3))
    graphdef, params = nnx_utils.split(net)
    jitted = jax.jit(lambda params, x: nnx_utils.merge(graphdef, params)(x))
    np.testing.assert_allclose(jitted(params, x), net(x), rtol=1e-6)


def test_abstract_module_matches_init_params():
    graphdef, shapes = nnx_utils.abstract_module(Net)
    params = nnx_utils.init_params(Net, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert nnx_utils.merge(graphdef, params)(jnp.ones((1, 3))).shape == (1, 4)


def test_init_params_depend_on_the_key_alone():
    same, again, other = (nnx_utils.init_params(Net, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same["blocks"]["0"]["kernel"], again["blocks"]["0"]["kernel"])
    assert not np.array_equal(same["blocks"]["0"]["kernel"], other["blocks"]["0"]["kernel"])
    assert not np.array_equal(same["blocks"]["0"]["kernel"], same["blocks"]["1"]["kernel"])


def test_logical_axes_add_layers_where_stacked():
    axes = nnx_utils.logical_axes(Net)
    assert axes["bias"] == (None,)
    assert axes["blocks"]["10"]["kernel"] == ("embed", "mlp")
    assert axes["stacked"]["kernel"] == ("layers", "embed", "mlp")


def test_count_params_of_abstract_parameters():
    assert nnx_utils.count_params(nnx_utils.abstract_module(Net)[1]) == 11 * 12 + 4 + 2 * 12
