"""`deployer cluster`: a local Kubernetes with a wired registry, by kind or from Debian's packages (native)."""

from __future__ import annotations

from collections.abc import Iterable

from airflow_deployer.errors import ConfigurationError, LocalClusterError
from airflow_deployer.progress import Progress

from .cluster_status import ClusterStatus, Part, Provider, ProviderChoice

__all__ = ["ClusterStatus", "Part", "Provider", "ProviderChoice", "choose", "down", "status", "up"]


def choose(choice: ProviderChoice) -> Provider:
    """The provider that `auto` means on this machine; any other choice is itself.

    A native cluster that exists already wins: `up`, `down` and `status` must mean the same cluster, and starting it
    gives the machine a Docker Engine, which kind would otherwise take for a reason to be chosen. Then kind where
    Docker answers and the `kind` program is there, then native on Debian 12 as root.

    Raises:
        LocalClusterError: neither can work here.
    """
    if choice != "auto":
        return choice
    from . import kind
    from .native import cluster, packages

    if cluster.exists():
        return "native"
    no_kind = kind.unsupported()
    if no_kind is None:
        return "kind"
    no_native = packages.unsupported()
    if no_native is None:
        return "native"
    raise LocalClusterError(
        "choosing a local cluster failed: neither kind nor native can work here",
        hint="Install Docker and kind and start Docker, or run this on Debian 12 as root (sudo).",
        details=[f"kind: {no_kind}", f"native: {no_native}"],
    )


def up(provider: ProviderChoice, progress: Progress, *, airflow: Iterable[str] = ()) -> ClusterStatus:
    """Have a local cluster and its registry run; safe to repeat, and quick when they do.

    Args:
        airflow: versions of Airflow whose public images the cluster must be able to get. Native makes stand-ins for
            those that it does not have yet; kind pulls public images itself.

    Raises:
        ConfigurationError: one of `airflow` is no version that can be deployed.
        LocalClusterError: it cannot work on this machine, or a step failed; the next `up` goes on from there.
    """
    images = public_images(airflow)
    if choose(provider) == "kind":
        from . import kind

        return kind.up(progress)
    from .native import cluster

    return cluster.up(progress, stand_ins_for=images)


def public_images(versions: Iterable[str]) -> list[str]:
    """What these versions of Airflow build and run on: the parents and the databases of their profiles.

    Raises:
        ConfigurationError: one is no version that can be deployed.
    """
    from airflow_deployer import airflow_profiles

    found = []
    for version in versions:
        profile = airflow_profiles.find_profile(version)
        if profile is None:
            raise ConfigurationError(
                f"Invalid --airflow: {airflow_profiles.unsupported(version)}.",
                hint=f"Name a release in full: deployer cluster up --airflow {airflow_profiles.DEFAULT_VERSION}",
            )
        found += [profile.parent, profile.postgres_image]
    return found


def down(provider: ProviderChoice, progress: Progress, *, purge: bool) -> None:
    """End the local cluster; with `purge` nothing of it stays.

    Raises:
        LocalClusterError: something of it could not be ended or removed.
    """
    if choose(provider) == "kind":
        from . import kind

        kind.down(progress, purge=purge)
        return
    from .native import cluster

    cluster.down(progress, purge=purge)


def status(provider: ProviderChoice) -> ClusterStatus:
    """What of the local cluster runs. Changes nothing.

    Raises:
        LocalClusterError: it cannot be told.
    """
    if choose(provider) == "kind":
        from . import kind

        return kind.status()
    from .native import cluster

    return cluster.status()
