"""What `import mlra_jax` offers, and that it costs nothing."""

import subprocess
import sys

import pytest

import mlra_jax
from mlra_jax import models


def test_importing_the_package_imports_neither_jax_nor_its_own_modules():
    code = "import sys, mlra_jax; dir(mlra_jax); print([m for m in sys.modules if m[:3] in ('jax', 'num', 'fla')])"
    code += "; print([m for m in sys.modules if m.startswith('mlra_jax.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_every_name_is_there_and_no_other():
    for name in mlra_jax.__all__:
        assert getattr(mlra_jax, name) is vars(mlra_jax)[name]  # kept, once it is imported
    assert set(mlra_jax.__all__) <= set(dir(mlra_jax))
    with pytest.raises(AttributeError, match="'mlra_jax' has no attribute 'Transfomer'"):
        _ = mlra_jax.Transfomer
    with pytest.raises(ImportError, match="Transfomer"):
        exec("from mlra_jax import Transfomer")


@pytest.mark.parametrize("name", models._PLACES)
def test_old_places_work_and_say_the_new_one(name):
    with pytest.warns(DeprecationWarning, match=f"mlra_jax.models.{name} is now .*{name}") as caught:
        value = getattr(models, name)
    assert value.__name__ == name
    assert caught[0].filename == __file__


def test_what_never_was_at_an_old_place_is_no_attribute_of_it():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = models.Nothing
