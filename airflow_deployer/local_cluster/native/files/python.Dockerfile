# Stands in for a public python:*-slim-* image: the same names in the same places, from Debian's own packages.
ARG SUITE
FROM airflow-deployer/debian:${SUITE}
ARG VERSION
ENV LANG=C.UTF-8 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
# Debian marks its Python as managed by apt; the public image's is the user's to install into.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv python3-pip \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /usr/lib/python3*/EXTERNALLY-MANAGED \
    && for name in python python3 python${VERSION}; do ln -s /usr/bin/python${VERSION} /usr/local/bin/$name; done \
    && for name in pip pip3; do ln -s /usr/bin/pip3 /usr/local/bin/$name; done
CMD ["python3"]
