# Stands in for a public postgres image: the same user, places and entrypoint behaviour, from Debian's own packages.
ARG SUITE
FROM airflow-deployer/debian:${SUITE}
ARG VERSION
# Without LLVM, Postgres leaves out just-in-time compilation by itself; it is two thirds of the image's size.
RUN groupadd --system --gid 999 postgres \
    && useradd --system --gid 999 --uid 999 --home-dir /var/lib/postgresql --shell /bin/bash postgres \
    && mkdir -p /etc/postgresql-common /docker-entrypoint-initdb.d \
    && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-${VERSION} \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
       /usr/lib/*/libLLVM* /usr/lib/llvm-* \
       /usr/lib/postgresql/${VERSION}/lib/llvmjit* /usr/lib/postgresql/${VERSION}/lib/bitcode \
    && sed -i "s/^#*listen_addresses = .*/listen_addresses = '*'/" \
       /usr/share/postgresql/${VERSION}/postgresql.conf.sample \
    && install -d -o postgres -g postgres -m 1777 /var/lib/postgresql /var/lib/postgresql/data \
    && install -d -o postgres -g postgres -m 3777 /var/run/postgresql
ENV LANG=C.UTF-8 PGDATA=/var/lib/postgresql/data PATH=$PATH:/usr/lib/postgresql/${VERSION}/bin
COPY postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
VOLUME /var/lib/postgresql/data
EXPOSE 5432
# SIGINT is Postgres' fast shutdown; SIGTERM would wait for every client to leave.
STOPSIGNAL SIGINT
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["postgres"]
