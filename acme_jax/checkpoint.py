"""Checkpoints in numbered directories: atomic to write, verified before they are trusted.

Layout: `<directory>/step_00000012/` holds `arrays/` (an Orbax checkpoint of the leaves),
`meta.json` (the caller's data and the description of the leaves) and `manifest.json` (the
SHA-256 of every other file). It is written under a temporary name and renamed when complete,
so that a process killed at any moment leaves either the whole checkpoint or none. In a job of
several processes one of them saves, alone, what all have (`fed.multihost.to_host`), so that a
checkpoint does not know how many processes or devices wrote it.

A pytree is stored as its list of leaves with their paths. It comes back in the structure of a
template, so NamedTuples, tuples and optimizer states need no registration, and PRNG keys,
dtypes and bits are those that were saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import checkpoint_files

_PREFIX = "step_"
_TEMPORARY = "tmp_"
_DAMAGED = "damaged_"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message says which and why."""


class CheckpointInfo(NamedTuple):
    """What is known of a checkpoint before its arrays are read."""

    step: int
    meta: dict[str, Any]


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    meta: dict[str, Any]
    tree: Any


class CheckpointStore:
    """The checkpoints of one run.

    Opening removes what an interrupted save left behind.

    Args:
      directory: made if absent.
      keep: the number of newest checkpoints kept; milestones are kept besides.
      log: receives one line for every damaged checkpoint that is passed over.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 3, log: Callable[[str], None] = print
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, got {keep}")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._log = log
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Steps of the stored checkpoints, oldest first; damaged ones are not told apart."""
        names = (p.name.removeprefix(_PREFIX) for p in self._directory.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(
        self, step: int, tree: Any, meta: dict[str, Any] | None = None, *, milestone: bool = False
    ) -> Path:
        """Saves a pytree of arrays; a checkpoint of the same step is replaced.

        Args:
          step: not negative; a larger step is newer.
          tree: arrays (JAX, NumPy or scalars), PRNG keys among them.
          meta: anything JSON can hold; `json.loads(json.dumps(meta))` comes back.
          milestone: keep this checkpoint however many newer ones there are.

        Returns:
          The checkpoint's directory.

        Raises:
          CheckpointError: it could not be written, such as on a full disk; what was written of it
            is removed, the older checkpoints are untouched, and the message says which is newest.
        """
        final = self._path(step)
        temporary = self._directory / f"{_TEMPORARY}{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        leaves, described = [], []
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            array, description = _encode(leaf)
            leaves.append(array)
            described.append({"path": jax.tree_util.keystr(path), **description})
        content = {"step": step, "milestone": milestone, "meta": meta or {}, "leaves": described}
        try:
            checkpoint_files.write(temporary, leaves, content)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            failure = checkpoint_files.disk_failure(error, self._directory, leaves)
            if failure is None:
                raise
            older = self.steps()
            kept = f"the newest kept is step {older[-1]}" if older else "there is no older one"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._directory}: "
                f"{failure}; {kept}; make room or mend the directory, then continue from there"
            ) from error
        if final.exists():  # Replaced, not merged; older steps cover the moment between.
            discarded = self._directory / f"{_TEMPORARY}old_{final.name}"
            final.rename(discarded)
            temporary.rename(final)
            shutil.rmtree(discarded)
        else:
            temporary.rename(final)
        self._prune()
        return final

    def newest(self) -> CheckpointInfo | None:
        """The newest checkpoint that is whole, or None.

        Damaged ones are reported through `log` and moved aside (`damaged_...`), so that they
        are neither counted nor found again.
        """
        for step in reversed(self.steps()):
            try:
                content = self._verified(step)
            except CheckpointError as error:
                path = self._path(step)
                aside = self._directory / f"{_DAMAGED}{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                older = self.steps()
                then = f"falling back to step {older[-1]}" if older else "no older one is left"
                self._log(f"checkpoint of step {step} is damaged ({error}); {then}")
                continue
            return CheckpointInfo(step, content["meta"])
        return None

    def restore(self, step: int, template: Any = None) -> Restored:
        """Reads one checkpoint.

        Args:
          step: one of `steps()`.
          template: a pytree with the saved structure, shapes and dtypes; its values are not
            used, and `jax.ShapeDtypeStruct` leaves will do. NumPy leaves come back as NumPy
            arrays, all others as JAX arrays (of the template leaf's sharding, where that
            spans several devices). None: a flat dictionary from path to array.

        Raises:
          CheckpointError: no such step, damaged, or the template does not fit.
        """
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step}; there are: {self.steps()}")
        content = self._verified(step)
        described = content["leaves"]
        saved = {leaf["path"]: leaf for leaf in described}
        if template is not None:
            _check_template(saved, template, step)
        data = checkpoint_files.read_arrays(self._path(step), len(described))
        leaves = [_decode(array, leaf) for array, leaf in zip(data, described, strict=True)]
        by_path = dict(zip(saved, leaves, strict=True))
        if template is None:
            return Restored(step, content["meta"], by_path)
        tree = jax.tree_util.tree_map_with_path(
            lambda path, like: _place(by_path[jax.tree_util.keystr(path)], like), template
        )
        return Restored(step, content["meta"], tree)

    def restore_latest(self, template: Any = None) -> Restored | None:
        """`restore` of `newest()`; None if there is no usable checkpoint."""
        info = self.newest()
        return None if info is None else self.restore(info.step, template)

    def _path(self, step: int) -> Path:
        return self._directory / f"{_PREFIX}{step:08d}"

    def _verified(self, step: int) -> dict[str, Any]:
        path = self._path(step)
        try:
            expected = dict(json.loads((path / "manifest.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise CheckpointError("its manifest is missing or unreadable") from None
        found = checkpoint_files.digests(path)
        for name in sorted(set(expected) | set(found)):
            if name not in found:
                raise CheckpointError(f"file {name} is missing")
            if name not in expected:
                raise CheckpointError(f"file {name} does not belong to it")
            if found[name] != expected[name]:
                raise CheckpointError(f"file {name} is truncated or altered")
        return json.loads((path / "meta.json").read_text())

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            try:
                content = json.loads((self._path(step) / "meta.json").read_text())
            except (OSError, ValueError):
                content = {}
            if not content.get("milestone", False):
                # Renamed first: a half-deleted directory must not look like a checkpoint.
                aside = self._directory / f"{_TEMPORARY}old_{step:08d}"
                self._path(step).rename(aside)
                shutil.rmtree(aside)


def _encode(leaf: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A leaf as a host array, and what is needed to make it again."""
    described = _describe(leaf)
    if described["key_impl"] is not None:
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array, {**described, "data_shape": array.shape, "data_dtype": array.dtype.name}


def _describe(leaf: Any) -> dict[str, Any]:
    """Shape, dtype and, for PRNG keys, implementation of an array, scalar or abstract array."""
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    impl = None
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
    return {"shape": list(array.shape), "dtype": str(array.dtype), "key_impl": impl}


def _decode(data: np.ndarray | None, described: dict[str, Any]) -> Any:
    if data is None:
        data = np.zeros(described["data_shape"], described["data_dtype"])
    if described["key_impl"] is None:
        return np.asarray(data)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=described["key_impl"])


def _place(value: Any, like: Any) -> Any:
    if isinstance(like, bool | int | float | np.generic):
        return type(like)(value)
    if isinstance(like, np.ndarray):
        return value
    sharding = getattr(like, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return jax.device_put(value, sharding)
    return jnp.asarray(value)


def _check_template(saved: dict[str, dict[str, Any]], template: Any, step: int) -> None:
    where = f"checkpoint of step {step} does not fit what is to be restored"
    wanted = {
        jax.tree_util.keystr(path): _describe(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    missing = [path for path in wanted if path not in saved]
    if missing:
        raise CheckpointError(f"{where}: it lacks {len(missing)} arrays, first {missing[0]}")
    extra = [path for path in saved if path not in wanted]
    if extra:
        raise CheckpointError(f"{where}: it has {len(extra)} more arrays, first {extra[0]}")
    for path, expected in wanted.items():
        stored = saved[path]
        if (stored["shape"], stored["dtype"]) != (expected["shape"], expected["dtype"]):
            raise CheckpointError(
                f"{where}: {path} is {stored['dtype']} {stored['shape']}, expected "
                f"{expected['dtype']} {expected['shape']}"
            )
