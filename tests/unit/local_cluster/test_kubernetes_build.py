"""The build's pure parts."""

from __future__ import annotations

from pathlib import Path

from airflow_deployer.local_cluster.native import kubernetes_build
from airflow_deployer.local_cluster.native.layout import Layout


def test_openapi_packages_are_found_by_their_marker(tmp_path: Path) -> None:
    for name, text in {
        "pkg/apis/apps/doc.go": "// +k8s:openapi-gen=true\npackage apps",
        "pkg/apis/apps/types.go": "// +k8s:openapi-gen=false",
        "pkg/util/util.go": "package util",
        "staging/src/k8s.io/api/core/v1/doc.go": "// +k8s:openapi-gen=true",
        "staging/src/k8s.io/api/core/v1/README.md": "+k8s:openapi-gen=true",
        "vendor/k8s.io/other/doc.go": "// +k8s:openapi-gen=true",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert kubernetes_build.openapi_packages(tmp_path) == [
        "k8s.io/kubernetes/pkg/apis/apps",
        "k8s.io/kubernetes/vendor/k8s.io/api/core/v1",
    ]


def test_linker_flags_carry_the_version() -> None:
    flags = kubernetes_build.version_flags()
    package = "k8s.io/kubernetes/vendor/k8s.io/component-base/version"
    assert flags.startswith("-s -w ")
    for pair in ("gitVersion=v1.20.2", "gitMajor=1", "gitMinor=20"):
        assert f"-X {package}.{pair}" in flags


def test_it_is_built_when_every_program_is_there(layout: Layout) -> None:
    assert not kubernetes_build.is_built(layout)
    kubernetes_build.directory(layout).mkdir()
    for program in kubernetes_build.PROGRAMS:
        assert not kubernetes_build.is_built(layout)
        kubernetes_build.binary(layout, program).touch()
    assert kubernetes_build.is_built(layout)
