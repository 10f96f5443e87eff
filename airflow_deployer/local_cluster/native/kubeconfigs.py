"""The kubeconfigs of the cluster's own parts, which name certificate files.

The user's kubeconfig is the matter of `local_cluster.kubeconfig`.
"""

from __future__ import annotations

import json
from pathlib import Path

from .certificates import certificate_path, key_path
from .layout import Layout


def write_kubeconfig(layout: Layout, user: str, server: str) -> Path:
    """Write the kubeconfig of the part whose certificate is called `user` (YAML, of which JSON is a part)."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "airflow-native",
                "cluster": {"server": server, "certificate-authority": str(certificate_path(layout, "ca"))},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate": str(certificate_path(layout, user)),
                    "client-key": str(key_path(layout, user)),
                },
            }
        ],
        "contexts": [{"name": "airflow-native", "context": {"cluster": "airflow-native", "user": user}}],
        "current-context": "airflow-native",
    }
    path = layout.configuration / f"{user}.kubeconfig"
    path.write_text(json.dumps(content, indent=2))
    return path
