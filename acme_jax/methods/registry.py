"""The methods by name. Adding one takes its file and one line here."""

from __future__ import annotations

from acme_jax.methods import (
    acme,
    acme_kde,
    celora,
    controls,
    feddhad,
    fedmosaic,
    fedvtc,
    pa3dfl,
    pfedhr,
)
from acme_jax.methods.method import Method, MethodError

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        controls.LOCAL,
        controls.FEDAVG,
        controls.FEDPROX,
        controls.DITTO,
        controls.HETEROFL,
        controls.FEDROLEX,
        controls.SMALLEST,
        acme.METHOD,
        acme_kde.METHOD,
        feddhad.FEDDH,
        feddhad.FEDAD,
        celora.METHOD,
        celora.FROZEN,
        fedvtc.METHOD,
        pa3dfl.METHOD,
        fedmosaic.METHOD,
        pfedhr.METHOD,
    )
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
      MethodError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
