"""Where compiled programs are kept between runs."""

from __future__ import annotations

import os

import jax

from mlra_jax.storage import RUN_PROTOCOLS, check_storage, is_remote


def keep_compiled(place: str) -> None:
    """Keeps programs compiled from now on in `place`, and takes those found there, which must be of the same versions.

    Of several processes the first one writes. In a bucket there are JAX's programs only: what XLA has measured of
    algorithms it writes to local disks alone.

    Args:
      place: a folder, which `~` may begin, or a bucket URL, which all hosts of a run and its next hosts can share;
        empty: nothing is kept.

    Raises:
      StorageError: the bucket's library is not installed.
    """
    if not place:
        return
    check_storage(place, RUN_PROTOCOLS)
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(place))
    if is_remote(place):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")
