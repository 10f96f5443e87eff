# Stands in for a public python:*-slim-* image whose Python is in no Debian release: the same names in the same places,
# from an interpreter of the machine that was built on the same release.
ARG SUITE
FROM airflow-deployer/debian:${SUITE} AS relocated
ARG VERSION
ADD interpreter.tar /usr/local/
# The programs look for their library where they were built; here the loader finds it by itself.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends binutils patchelf \
    && for file in /usr/local/bin/python${VERSION} $(find /usr/local/lib -name '*.so*' -type f); do \
         strip --strip-unneeded $file && patchelf --remove-rpath $file || exit 1; \
       done

FROM airflow-deployer/debian:${SUITE}
ARG VERSION
ENV LANG=C.UTF-8 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
# What modules of the standard library are linked to; some of it only on some machines.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
       libbz2-1.0 libcrypt1 libdb5.3 libexpat1 libffi8 libgdbm-compat4 libgdbm6 liblzma5 libncursesw6 libnsl2 \
       libreadline8 libsqlite3-0 libssl3 libtinfo6 libuuid1 netbase tzdata zlib1g \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
COPY --from=relocated /usr/local /usr/local
# As in the public images, tkinter's own libraries are left out; every other module must import.
RUN ldconfig \
    && ln -sf python${VERSION} /usr/local/bin/python3 \
    && ln -sf python3 /usr/local/bin/python \
    && python3 -m ensurepip --default-pip \
    && python3 -m compileall -q /usr/local/lib/python${VERSION} \
    && cd /usr/local/lib/python${VERSION}/lib-dynload \
    && for file in *.so; do \
         case $file in _tkinter.*) ;; *) python3 -I -c "import ${file%%.*}" || exit 1 ;; esac; \
       done
CMD ["python3"]
