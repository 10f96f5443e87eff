"""The Kubernetes API as this project uses it: a thin adapter on the official client's transport.

Objects are plain dicts in the API's own shape. The typed APIs of the client cost about a second of import time, so
only its configuration, authentication and connection pool are used. Paths and verbs are those of
https://kubernetes.io/docs/reference/using-api/api-concepts/.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from airflow_deployer.errors import ClusterError
from airflow_deployer.kube_context import KubeContext

FIELD_MANAGER = "airflow-deployer"

_PROXY_TIMEOUT = 2.0

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Where objects of one kind live in the API: `group` is empty for the core group."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """The object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """The request path of the collection, of one object or of a subresource of it."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/" + "/".join(quote(part, safe="") for part in parts)


NAMESPACE = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
NODE = Kind("", "v1", "Node", "nodes", namespaced=False)
POD = Kind("", "v1", "Pod", "pods")
EVENT = Kind("", "v1", "Event", "events")
SECRET = Kind("", "v1", "Secret", "secrets")
SERVICE = Kind("", "v1", "Service", "services")
CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps")
CLAIM = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
STATEFUL_SET = Kind("apps", "v1", "StatefulSet", "statefulsets")
CONTROLLER_REVISION = Kind("apps", "v1", "ControllerRevision", "controllerrevisions")
STORAGE_CLASS = Kind("storage.k8s.io", "v1", "StorageClass", "storageclasses", namespaced=False)
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases")
ACCESS_REVIEW = Kind(
    "authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False
)
KINDS = {kind.kind: kind for kind in (NAMESPACE, SECRET, SERVICE, CLAIM, STATEFUL_SET)}


class ApiError(ClusterError):
    """The API server answered a request with an error; `status` is the HTTP code and `reason` the Status' reason.

    Source: `Status` in https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/.
    """

    def __init__(self, message: str, *, status: int, reason: str, body: Object, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason
        self.body = body


class UnreachableError(ClusterError):
    """No answer came from the API server: refused, timed out, or the connection broke."""


class Cluster:
    """One API server, pinned to one context; safe to use from several threads.

    Raises:
        ClusterError: on construction, when the kubeconfig names credentials that cannot be loaded.
    """

    def __init__(self, context: KubeContext) -> None:
        from kubernetes.client import ApiClient, Configuration
        from kubernetes.config import ConfigException, load_kube_config

        self.context = context
        configuration = Configuration()
        try:
            load_kube_config(  # type: ignore[no-untyped-call]
                config_file=context.kubeconfig, context=context.name, client_configuration=configuration
            )
        except (ConfigException, OSError, ValueError, KeyError, TypeError) as error:
            raise ClusterError(
                f"Cannot use the context {context.name!r} of {context.kubeconfig}: {' '.join(str(error).split())}.",
                hint=f"kubectl --context {context.name} cluster-info   shows whether the context works at all",
            ) from error
        # Retrying is ours: a request that may have been carried out must not be sent twice behind our back.
        configuration.retries = False
        configuration.connection_pool_maxsize = 16
        self._configuration = configuration
        self._client = ApiClient(configuration)
        self._clock_offset = 0.0

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._configuration.host)

    def server_time(self) -> float:
        """Seconds since the epoch by the API server's clock, as its last `Date` header told (1 s resolution)."""
        return time.time() + self._clock_offset

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()  # type: ignore[no-untyped-call]

    # -- requests -----------------------------------------------------------------------------------------------

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """Return one object, or None where there is none."""
        try:
            return self._json("GET", kind.path(namespace, name), what=f"read {kind.kind} {name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list_objects(
        self, kind: Kind, namespace: str | None, *, fields: str = "", labels: str = "", limit: int | None = None
    ) -> Object:
        """Return the list object: `items`, and `metadata.resourceVersion` to watch from.

        Args:
            fields: a field selector.
            labels: a label selector.
            limit: at most so many items.
        """
        query = {"fieldSelector": fields, "labelSelector": labels, "limit": str(limit) if limit else ""}
        return self._json("GET", kind.path(namespace), query=query, what=f"list {kind.plural}")

    def create(self, kind: Kind, namespace: str | None, body: Object) -> Object:
        """Create an object; an `ApiError` of status 409 means that it exists."""
        name = body.get("metadata", {}).get("name", "")
        return self._json(
            "POST",
            kind.path(namespace),
            query={"fieldManager": FIELD_MANAGER},
            body=body,
            what=f"create {kind.kind} {name}".strip(),
        )

    def replace(self, kind: Kind, namespace: str | None, body: Object) -> Object:
        """Replace an object; its `metadata.resourceVersion` guards against a lost update (409)."""
        name = body["metadata"]["name"]
        return self._json(
            "PUT",
            kind.path(namespace, name),
            query={"fieldManager": FIELD_MANAGER},
            body=body,
            what=f"update {kind.kind} {name}",
        )

    def apply(
        self, kind: Kind, namespace: str | None, body: Object, *, dry_run: bool = False, force: bool = False
    ) -> Object:
        """Server-side apply as field manager `airflow-deployer`; return the object that results.

        Source: https://kubernetes.io/docs/reference/using-api/server-side-apply/.

        Args:
            dry_run: change nothing, return what would result.
            force: take over fields that other managers own.

        Raises:
            ApiError: 409 names the fields of other managers, 422 a value that is invalid or immutable.
        """
        name = body["metadata"]["name"]
        query = {"fieldManager": FIELD_MANAGER, "dryRun": "All" if dry_run else "", "force": "true" if force else ""}
        return self._json(
            "PATCH",
            kind.path(namespace, name),
            query=query,
            body=body,
            content_type="application/apply-patch+yaml",
            what=f"apply {kind.kind} {name}",
        )

    def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        orphan: bool = False,
        grace_seconds: int | None = None,
    ) -> bool:
        """Ask for an object to be deleted; False when it is not there (or, given `uid`, is another one by now).

        Args:
            uid: delete only the object with this UID.
            orphan: leave its dependants (a StatefulSet's pods) running.
            grace_seconds: in place of the object's own grace period; 0 deletes it at once, its processes unheeded.
        """
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        options["propagationPolicy"] = "Orphan" if orphan else "Background"
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            self._json("DELETE", kind.path(namespace, name), body=options, what=f"delete {kind.kind} {name}")
        except ApiError as error:
            if error.status == 404 or (error.status == 409 and uid is not None):
                return False
            raise
        return True

    def annotate(
        self, kind: Kind, namespace: str | None, name: str, annotations: Mapping[str, str], *, uid: str
    ) -> bool:
        """Set annotations by a JSON merge patch; False when the object is gone, is another, or may not be patched."""
        body: Object = {"metadata": {"uid": uid, "annotations": dict(annotations)}}
        try:
            self._json(
                "PATCH",
                kind.path(namespace, name),
                body=body,
                content_type="application/merge-patch+json",
                what=f"annotate {kind.kind} {name}",
            )
        except ApiError as error:
            if error.status in (403, 404, 409, 422):
                return False
            raise
        return True

    def can(self, verb: str, kind: Kind, namespace: str | None, subresource: str = "") -> bool:
        """Ask whether this user may do `verb` on `kind` (SelfSubjectAccessReview)."""
        attributes = {"verb": verb, "group": kind.group, "version": kind.version, "resource": kind.plural}
        if kind.namespaced and namespace:
            attributes["namespace"] = namespace
        if subresource:
            attributes["subresource"] = subresource
        review = {
            "apiVersion": ACCESS_REVIEW.api_version,
            "kind": ACCESS_REVIEW.kind,
            "spec": {"resourceAttributes": attributes},
        }
        answer = self._json("POST", ACCESS_REVIEW.path(None), body=review, what="check the permissions")
        return bool(answer.get("status", {}).get("allowed"))

    def version(self) -> str:
        """The API server's version, such as `v1.34.1` (`GET /version`)."""
        return str(self._json("GET", "/version", what="read the version").get("gitVersion", ""))

    def log(self, namespace: str, pod: str, container: str, *, previous: bool = False, lines: int = 20) -> list[str]:
        """The last lines of a container's log; empty when there is none (yet)."""
        query = {"container": container, "tailLines": str(lines), "previous": "true" if previous else ""}
        try:
            response = self._send("GET", POD.path(namespace, pod, "log"), query=query, what=f"read the log of {pod}")
        except ApiError as error:
            if error.status in (400, 404):  # 400: the container has not started, or there was none before
                return []
            raise
        with contextlib.closing(response):
            return str(response.data.decode("utf-8", "replace")).splitlines()

    def pod_document(self, namespace: str, pod: str, port: int, path: str) -> Object | None:
        """The JSON document that a pod serves at a port, through the API server; None where that is not possible.

        It takes `get` on pods/proxy, and an API server that reaches pods directly, which not every cluster gives.
        """
        try:
            response = self._send(
                "GET",
                POD.path(namespace, f"{pod}:{port}", "proxy") + path,
                what=f"ask {pod}",
                read_timeout=_PROXY_TIMEOUT,
            )
        except (ApiError, UnreachableError):
            return None
        with contextlib.closing(response):
            try:
                document = json.loads(response.data)
            except ValueError:
                return None
        return document if isinstance(document, dict) else None

    def watch(
        self, kind: Kind, namespace: str, *, fields: str = "", resource_version: str, seconds: int
    ) -> Iterator[tuple[str, Object]]:
        """Yield `(type, object)` as the API server reports changes, for at most `seconds`.

        Ends quietly when the time is up or the connection breaks: the caller lists again and watches on. A stale
        `resource_version` is yielded as an `ERROR` with a Status object.
        """
        from urllib3.exceptions import HTTPError

        query = {
            "watch": "true",
            "fieldSelector": fields,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
        }
        response = self._send(
            "GET", kind.path(namespace), query=query, what=f"watch {kind.plural}", read_timeout=seconds + 5.0
        )
        with contextlib.closing(response):
            pending = b""
            try:
                for chunk in response.stream(65536, decode_content=True):
                    *complete, pending = (pending + chunk).split(b"\n")
                    for line in filter(None, complete):
                        event = json.loads(line)
                        yield event["type"], event["object"]
            except HTTPError:
                return

    # -- transport ----------------------------------------------------------------------------------------------

    def _json(
        self,
        method: str,
        path: str,
        *,
        what: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        response = self._send(method, path, what=what, query=query, body=body, content_type=content_type)
        with contextlib.closing(response):
            document: Object = json.loads(response.data)
            return document

    def _send(
        self,
        method: str,
        path: str,
        *,
        what: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        read_timeout: float = 30.0,
    ) -> Any:
        from kubernetes.client.exceptions import ApiException
        from kubernetes.config import ConfigException
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        pairs = {key: value for key, value in (query or {}).items() if value}
        url = self.server + path + (f"?{urlencode(pairs)}" if pairs else "")
        headers = {"Accept": "application/json", "User-Agent": FIELD_MANAGER}
        data = None
        if body is not None:
            headers["Content-Type"] = content_type
            data = json.dumps(body).encode()
        try:
            # auth_settings() refreshes tokens and runs credential plugins (`exec` in the kubeconfig).
            token = self._configuration.auth_settings().get("BearerToken")
            if token and token.get("value"):
                headers["Authorization"] = str(token["value"])
            response = self._client.rest_client.pool_manager.request(
                method,
                url,
                body=data,
                headers=headers,
                preload_content=False,
                retries=False,
                timeout=Timeout(connect=5.0, read=read_timeout),
            )
        except (HTTPError, OSError, ApiException, ConfigException) as error:
            raise self._unreachable(what, error) from error
        self._note_clock(response.headers.get("Date"))
        if response.status >= 400:
            with contextlib.closing(response):
                raise self._refused(what, response.status, response.data)
        return response

    def _note_clock(self, date: str | None) -> None:
        if date:
            with contextlib.suppress(ValueError, TypeError):
                self._clock_offset = email.utils.parsedate_to_datetime(date).timestamp() - time.time()

    def _unreachable(self, what: str, error: BaseException) -> UnreachableError:
        if self.context.looks_local:
            hint = "deployer cluster up   starts the local cluster again (kind, minikube and others: their own start)"
        else:
            hint = f"kubectl --context {self.context.name} cluster-info   shows whether it can be reached at all"
        return UnreachableError(
            f"Cannot {what}: the API server {self.server} of context {self.context.name!r} cannot be reached "
            f"({_cause(error)}).",
            hint=hint,
        )

    def _refused(self, what: str, status: int, data: bytes) -> ApiError:
        body: Object = {}
        with contextlib.suppress(ValueError):
            parsed = json.loads(data)
            if isinstance(parsed, dict):
                body = parsed
        message = str(body.get("message") or data.decode("utf-8", "replace")[:300]).strip()
        hint = ""
        if status == 401:
            hint = f"renew the credentials of context {self.context.name!r} in {self.context.kubeconfig}"
        elif status == 403:
            hint = "ask an administrator of the cluster for a Role with this verb and resource"
        return ApiError(
            f"Cannot {what} in context {self.context.name!r}: {message} (HTTP {status}).",
            status=status,
            reason=str(body.get("reason", "")),
            body=body,
            hint=hint,
        )


def _cause(error: BaseException) -> str:
    """The shortest text that still names the cause of a connection error."""
    text = str(error)
    if "Connection refused" in text:
        return "connection refused"
    if "timed out" in text or "Timeout" in type(error).__name__:
        return "no answer in time"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not signed by the certificate authority in the kubeconfig"
    if "Name or service not known" in text or "nodename nor servname" in text:
        return "its name does not resolve"
    return " ".join(text.split())[:200] or type(error).__name__
