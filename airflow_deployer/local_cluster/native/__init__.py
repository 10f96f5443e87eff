"""The native provider: a real Kubernetes from Debian's packages alone, as processes of this machine."""
