"""Where the native cluster keeps its state: every file and directory, by name.

`state` survives a reboot and belongs to root alone (mode 0700): a pod reaches its volume through a bind mount, which
needs no right to the directories above it. `run` holds sockets and mounts, which end with the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTEXT = "airflow-native"
NODE_NAME = "airflow-native"


@dataclass(frozen=True)
class Layout:
    """The paths of one native cluster.

    Args:
        state: lasting state: cache, certificates, etcd, images, volumes, logs.
        run: what exists only while processes run: sockets, container mounts.
    """

    state: Path = Path("/var/lib/airflow-deployer/native")
    run: Path = Path("/run/airflow-deployer/native")

    @property
    def lock(self) -> Path:
        """Held (flock) by the one command that changes the cluster. Beside the directories that `down` removes."""
        return self.run.with_name(f"{self.run.name}.lock")

    @property
    def cache(self) -> Path:
        """What takes minutes to make and can always be made again: Kubernetes binaries, the root file system."""
        return self.state / "cache"

    @property
    def certificates(self) -> Path:
        """The cluster's CA, keys and certificates."""
        return self.state / "certificates"

    @property
    def configuration(self) -> Path:
        """Generated configuration files of the processes."""
        return self.state / "configuration"

    @property
    def processes(self) -> Path:
        """One JSON record per process: pid, start time, fingerprint."""
        return self.state / "processes"

    @property
    def logs(self) -> Path:
        """What the processes and the long commands print."""
        return self.state / "logs"

    @property
    def etcd(self) -> Path:
        """etcd's data directory."""
        return self.state / "etcd"

    @property
    def registry(self) -> Path:
        """The registry's storage."""
        return self.state / "registry"

    @property
    def docker(self) -> Path:
        """The Docker Engine's data root, when the engine is ours."""
        return self.state / "docker"

    @property
    def containerd(self) -> Path:
        """Root of the containerd that runs the pods."""
        return self.state / "containerd"

    @property
    def certs_d(self) -> Path:
        """containerd's registry host configuration: `<host:port>/hosts.toml`, read anew for every pull."""
        return self.configuration / "certs.d"

    @property
    def cni(self) -> Path:
        """The pod network's configuration directory."""
        return self.configuration / "cni"

    @property
    def addresses(self) -> Path:
        """host-local's record of the pod addresses in use."""
        return self.state / "addresses"

    @property
    def kubelet(self) -> Path:
        """The kubelet's root directory."""
        return self.state / "kubelet"

    @property
    def volume_plugins(self) -> Path:
        """Where the kubelet and the controllers look for volume plugins; each makes its directory at its start."""
        return self.kubelet / "volume-plugins"

    @property
    def volumes(self) -> Path:
        """One directory per PersistentVolume."""
        return self.state / "volumes"

    @property
    def network_record(self) -> Path:
        """The pod network that was chosen, and what must be put back when it goes."""
        return self.state / "network.json"

    @property
    def images_record(self) -> Path:
        """Which inputs the images in the registry were made from, and their digests."""
        return self.state / "images.json"

    @property
    def containerd_socket(self) -> Path:
        """The CRI socket."""
        return self.run / "containerd.sock"

    @property
    def admin_kubeconfig(self) -> Path:
        """A kubeconfig of the cluster's administrator that names files."""
        return self.configuration / "admin.kubeconfig"

    def ensure_directories(self) -> None:
        """Make `state` and `run`, readable by their owner alone."""
        for directory in (self.state, self.run):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
        for directory in (self.cache, self.certificates, self.configuration, self.processes, self.logs, self.volumes):
            directory.mkdir(exist_ok=True)
