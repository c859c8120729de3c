"""One device, eight fake ones, and a full disk: what `devices_worker.py` saw in a process of its
own."""

import json
from pathlib import Path

import numpy as np
import pytest
from subprocesses import run_python

WORKER = Path(__file__).with_name("devices_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    done = run_python("-W", "error::DeprecationWarning:jflow", WORKER, folder, devices=8)
    out = json.loads(done.stdout)
    assert out["devices"] == 8
    return out, done.stderr


@pytest.fixture
def laid_out(seen):
    """What `sharding_worker.py` saw there."""
    return seen[0]["layouts"]


# Float32: the sum over rows is taken in another order, and Adam's division by a small second moment
# widens it.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("loss", ["free", "keyed"])
def test_mesh_gives_the_losses_of_one_device(seen, loss):
    out, _ = seen
    np.testing.assert_allclose(out[f"{loss}_mesh"], out[f"{loss}_one"], **CLOSE)
    np.testing.assert_allclose(out[f"{loss}_params_mesh"], out[f"{loss}_params_one"], **CLOSE)
    assert len(set(out[f"{loss}_one"])) == 10  # the training moves


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_mapped_key_free_loss_is_that_of_one_device(seen, how):
    out, _ = seen
    np.testing.assert_allclose(out[f"free_{how}"], out["free_one"], **CLOSE)
    np.testing.assert_allclose(out[f"free_params_{how}"], out["free_params_one"], **CLOSE)


def test_mapped_shards_draw_their_own_noise(seen):
    out, _ = seen
    assert len(set(out["noise"])) == 8
    assert out["noise_mean"] == pytest.approx(np.mean(out["noise"]), rel=1e-5)
    np.testing.assert_allclose(out["keyed_pmap"], out["keyed_shard_map"], **CLOSE)
    assert not np.allclose(out["keyed_pmap"], out["keyed_one"], rtol=1e-3)


def test_a_loss_that_solves_an_ode_is_the_same_under_pmap_and_shard_map(seen):
    out, _ = seen
    np.testing.assert_allclose(out["ode_pmap"], out["ode_shard_map"], **CLOSE)
    assert np.isfinite(out["ode_pmap"]).all() and len(set(out["ode_pmap"])) == 4


def test_mapped_states_stay_equal_on_all_shards(seen):
    out, _ = seen
    assert out["free_pmap_spread"] == out["keyed_pmap_spread"] == out["refresh_spread"] == 0
    assert out["refresh_mean"][0] == pytest.approx(out["refresh_mean"][1], rel=1e-5)
    assert out["refresh_shard_map"] == pytest.approx(out["refresh_mean"][1], rel=1e-5)


def test_fit_over_a_mesh_resumes_and_keeps_placements(seen):
    out, _ = seen
    assert out["fit_same"] and out["fit_sharding_kept"] and out["fit_loaded"]


def test_full_disk_leaves_the_checkpoint_before(seen):
    out, stderr = seen
    assert len(out["disk"]) == 4
    for message, steps, there, whole in out["disk"]:
        assert (
            "cannot write checkpoint" in message
            and "File too large" in message
            and "\n" not in message
        )
        assert "the newest whole one is of step 1" in message
        assert steps == [1] and there == ["00000001"] and whole
    assert "Traceback" not in stderr and "orbax" not in stderr


@pytest.mark.parametrize(
    "layout",
    ["flow_data", "flow_fsdp", "flow_tensor", "flow_in_parts", "velocity_fsdp", "velocity_tensor"],
)
def test_losses_are_those_of_one_device(laid_out, layout):
    """Loss and gradient norm of every step. Float32: sums over rows and features are taken in
    another order."""
    one = laid_out[f"{layout.split('_')[0]}_one"]["losses"]
    np.testing.assert_allclose(laid_out[layout]["losses"], one, rtol=2e-5)
    assert len(set(np.round(one, 4))) == 8


@pytest.mark.parametrize("name", ["flow", "velocity"])
def test_a_device_keeps_its_part_of_the_state(laid_out, name):
    """Params, their average and Adam's two moments: an eighth of all but the small leaves."""
    whole, fsdp, tensor = (
        laid_out[f"{name}_{layout}"]["bytes"] for layout in ("one", "fsdp", "tensor")
    )
    assert whole / 8 <= fsdp < whole / 7
    assert tensor < 0.8 * whole
    assert laid_out["flow_data"]["bytes"] == laid_out["flow_one"]["bytes"]


def test_fsdp_gathers_weights_layer_by_layer_and_no_rows(laid_out):
    """No gathered array has the 16 rows of the batch, none the depth of the scan."""
    gathers = [
        shape for name in ("flow", "velocity") for shape in laid_out[f"{name}_fsdp"]["gathers"]
    ]
    assert gathers and all(16 not in shape and 3 not in shape for shape in gathers)
    assert laid_out["velocity_fsdp"]["temporary"] < 1.2 * laid_out["velocity_one"]["temporary"]


def test_init_sharded_is_init_in_place(laid_out):
    assert laid_out["init_placed"] and laid_out["init_close"]


@pytest.mark.parametrize("network", ["flux", "mean_flow"])
def test_a_pipeline_has_the_values_and_gradients_of_one_device(seen, network):
    assert seen[0]["pipelines"]["same"][network] < 2e-6  # float32, over the largest gradient


def test_a_pipeline_trains_as_one_device_in_a_third_of_its_memory(seen):
    out = seen[0]["pipelines"]["training"]
    for way in ("kept", "again"):  # with all activations kept, and two rounds with remat
        np.testing.assert_allclose(out[f"{way} losses"], out["one losses"], **CLOSE)
        assert out[f"{way} peak"] < 0.35 * out["one peak"]
        assert out[f"{way} state"] < 0.3 * out["one state"]  # a quarter of the layers, and the ends
    # Its checkpoint goes on on one device: the loss falls on.
    assert out["goes on"] < out["again losses"][0]


def test_a_pipeline_drops_out_by_row_and_key(seen):
    assert seen[0]["pipelines"]["dropout"] == [8, True, False]
