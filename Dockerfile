# The same image as `make image`, where a base image can be pulled: docker build -t netpol-agent:dev .
# The base is used only to build, and must be Debian 12, or a mirror's copy of it. --build-arg UNLOCKED=1 takes the Debian
# packages that its mirror has now. One script makes the root file system both ways; a test compares the rest.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
RUN python3 -m venv /venv
WORKDIR /sources
COPY pyproject.toml README.md ./
COPY deploy/image deploy/image
COPY agent agent
ARG UNLOCKED=
RUN UNLOCKED="$UNLOCKED" /venv/bin/python deploy/image/root.py --arch "$(dpkg --print-architecture)" /root-of-image

FROM scratch
COPY --from=build /root-of-image/ /
ENV PATH=/usr/sbin:/usr/bin
ENV LANG=C.UTF-8
LABEL org.opencontainers.image.title="netpol-agent"
LABEL org.opencontainers.image.version="0.1.0"
LABEL org.opencontainers.image.description="A Kubernetes NetworkPolicy enforcement agent for iptables and ipset"
LABEL org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /
ENTRYPOINT ["/usr/bin/netpol-agent"]
