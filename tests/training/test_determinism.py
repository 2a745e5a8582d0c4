"""Training repeats to the bit, and a command says whether it does."""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import pytest

from mlra_jax.cli.train import main
from mlra_jax.training import determinism
from mlra_jax.training.determinism import check_determinism
from mlra_jax.training.step import TrainState


@pytest.fixture
def command(monkeypatch, config):
    """`mlra-train` with the tiny configuration, whose state is one array and whose step adds what it is told."""

    def run(adds, *options):
        """`adds(n)`: what each call of the n-th compiled step adds, one after the other."""
        compiled = itertools.count()

        def make_step(config):
            values = adds(next(compiled))
            return lambda state, batch: (
                dataclasses.replace(state, params={"w": state.params["w"] + next(values)}),
                {},
            )

        monkeypatch.setattr("mlra_jax.cli.configs.parse_train_args", lambda argv: config)
        monkeypatch.setattr(
            determinism, "init_state", lambda config: TrainState({"w": jnp.ones(3)}, (), jnp.zeros(()))
        )
        monkeypatch.setattr(determinism, "make_train_step", make_step)
        return main(["--check-determinism", *options])

    return run


@pytest.mark.parametrize(
    ("adds", "status", "said"),
    [
        (lambda n: itertools.repeat(1.0), 0, "repeats to the bit: after 2 steps, made twice and once more"),
        (
            lambda n: itertools.count(),
            1,
            "does not repeat: after 2 steps, made once more by the same compiled step",
        ),
        (
            lambda n: itertools.repeat(1 + 2e-7 * n),
            1,
            "made once more by a step compiled anew, 1 of 1 arrays",
        ),
    ],
    ids=["equal", "drifts", "compiles otherwise"],
)
def test_the_command_says_whether_training_repeats_and_writes_nothing(
    adds, status, said, command, config, capsys
):
    assert command(adds, "2") == status
    assert said in capsys.readouterr().out
    assert not os.path.exists(config.out)


def test_no_steps_are_refused(command, capsys):
    assert command(lambda n: itertools.repeat(0.0), "0") == 2
    assert "give a positive number of steps" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_a_run_repeats_on_a_gpu(config):
    # So many tokens of so few ids that sums in no order would differ.
    data = dataclasses.replace(config.data, seq_len=256, global_batch=64, micro_batch=8)
    model = dataclasses.replace(config.model, compute_dtype="bfloat16")
    found = check_determinism(dataclasses.replace(config, data=data, model=model), 5)
    assert found.repeats, found
